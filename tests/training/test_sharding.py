"""Sharded runs (FSDP2) on two gloo processes: losses, exports, resume on other numbers of processes, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
BARE = ["--config=playground", "hooks.verify_export=false", "hooks.sample_every=0", "run.log_every=1"]
SMALL: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def small(tiny_sd: Path, pairs_file: Path) -> None:
    SMALL[:] = [*BARE, f"backbone.path={tiny_sd}", f"data.path={pairs_file}", "data.batch_size=4"]
    SMALL[:] += ["optimizer.lr=1e-3", "optimizer.lr_warmup_steps=0", "hooks.checkpoint_every=2"]


@pytest.fixture(scope="module")
def sharded(two_processes: Callable) -> Callable[..., Any]:
    """Run a recipe sharded over two processes."""

    def run(name: str, *words: str, **environment: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for key, value in (FSDP | environment).items():
                patch.setenv(key, value)
            done = two_processes(name, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return run


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "export").rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}/{k}": v for file in files for k, v in load_file(file).items()}


def same(a: Path, b: Path, *, loss: float = 1e-5, weight: float = 1e-5) -> None:
    assert [row.keys() for row in metrics(a)] == [row.keys() for row in metrics(b)]
    for one, other in zip(metrics(a), metrics(b), strict=True):
        for key in one:
            if "accuracy" not in key:  # of margins that are almost 0 it is a matter of rounding
                assert one[key] == pytest.approx(other[key], abs=10 * loss if "margin" in key else loss, rel=1e-4), (
                    one["step"],
                    key,
                )
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=weight, rtol=0, msg=name)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_sharded_run_equals_one_that_is_not(tmp_path: Path, recipe: Callable, sharded: Callable, rank: int) -> None:
    settings = [*SMALL, f"backbone.lora_rank={rank}", "trainer.steps=4", "hooks.ema_decay=0.9", "optimizer.eps=1e-4"]
    recipe("diffusion_dpo", *settings, f"run.folder={tmp_path / 'one'}", "trainer.grad_accum=4")
    done = sharded("diffusion_dpo", *settings, f"run.folder={tmp_path / 'two'}", "trainer.grad_accum=2")
    assert "of a network sharded over 2 processes" in done.stdout
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", ["sharded", "two_processes"])
def test_resuming_on_one_two_and_one_processes(
    tmp_path: Path, recipe: Callable, request: pytest.FixtureRequest, kind: str, rank: int
) -> None:
    """The samples of every step are the same; the losses agree to 1e-5."""
    settings = [*SMALL, f"backbone.lora_rank={rank}", "hooks.ema_decay=0.9", "hooks.keep_checkpoints=9"]
    settings += ["optimizer.eps=1e-4"]
    one = ["trainer.grad_accum=2"]
    recipe("diffusion_dpo", *settings, *one, f"run.folder={tmp_path / 'whole'}", "trainer.steps=6")
    moved = [*settings, f"run.folder={tmp_path / 'moved'}", "run.resume=true"]
    recipe("diffusion_dpo", *moved, *one, "trainer.steps=2")
    done = request.getfixturevalue(kind)("diffusion_dpo", *moved, "trainer.steps=4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in done.stdout and "x 2 processes" in done.stdout
    assert ("sharded over 2" in done.stdout) == (kind == "sharded")
    recipe("diffusion_dpo", *moved, *one, "trainer.steps=6")
    same(tmp_path / "whole", tmp_path / "moved")


WATCHED = ["monitor.every=2", "monitor.prompt_count=3", "hooks.sample_every=2"]
WATCHED += ["hooks.sample_prompts=[small red circle on white]", "data.limit=16"]
ONLINE = ["--config=playground", "hooks.verify_export=false", "optimizer.lr_warmup_steps=0", "data.batch_size=2"]
ONLINE += ["hooks.checkpoint_every=0", "trainer.steps=2", "optimizer.eps=1e-4"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("diff_instruct_star", [*WATCHED, "algorithm.aux_rounds=2"]),
        ("diff_instruct_star", ["data.limit=16", "algorithm.aux_rounds=1", "backbone.lora_rank=0", "teacher.lora_rank=0"]),
        ("refl", [*WATCHED, "hooks.sample_every=0"]),
        ("r0", ["data.limit=16", "hooks.sample_every=0", "algorithm.start_weight=1", "backbone.lora_rank=0"]),
        ("r0", ["data.limit=16", "hooks.sample_every=0", "algorithm.start_weight=1"]),
        ("pso", ["data.limit=16", "hooks.sample_every=0"]),
    ],
)
def test_online(tmp_path: Path, recipe: Callable, sharded: Callable, name: str, settings: list[str]) -> None:
    recipe(name, *ONLINE, *settings, f"run.folder={tmp_path / 'one'}", "trainer.grad_accum=2")
    sharded(name, *ONLINE, *settings, f"run.folder={tmp_path / 'two'}")
    same(tmp_path / "one", tmp_path / "two", loss=1e-4, weight=1e-4)
