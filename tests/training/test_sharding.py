"""Sharded runs (FSDP2) on two gloo processes: losses, exports, resume on other numbers of processes, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.launch import prepare_multi_gpu_env
from few_layers import few_layers
from safetensors.torch import load_file

from diffalign.algorithms.pso import PSOCustomization
from diffalign.networks.sharding import check_launch
from diffalign.training import recipe as recipe_parts
from diffalign.training.recipe import check_even_passes

ROOT = Path(__file__).parents[2]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
BARE = ["--config=playground", "hooks.verify_export=false", "hooks.sample_every=0", "run.log_every=1"]
SMALL: list[str] = []
RECIPE = "import runpy, sys; runpy.run_path(sys.argv[1])['main'](sys.argv[2:])"
GRID = ["hooks.sample_every=2", "hooks.sample_prompts=[small red circle on white]", "hooks.sample_steps=2"]


@pytest.fixture(scope="module", autouse=True)
def small(tiny_sd: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cost of a first operation on shards is that of the number of tensors."""
    model = few_layers(tiny_sd, tmp_path_factory.mktemp("small") / "pipeline")
    SMALL[:] = [*BARE, f"backbone.path={model}", f"data.path={pairs_file}", "data.batch_size=4"]
    SMALL[:] += ["optimizer.lr=1e-3", "optimizer.lr_warmup_steps=0", "hooks.checkpoint_every=2"]
    return model


KEPT = """
import runpy, sys
from types import SimpleNamespace
import forks
from diffalign.networks import verify

def fresh(command, env, **options):
    assert not env.keys() & {"RANK", "WORLD_SIZE", "MASTER_PORT"}, "of the launcher"
    return forks.verifier.run(*command[2:])

if not hasattr(forks, "verifier"):
    forks.verifier = forks.Server()  # before the first backward pass
    verify.subprocess = SimpleNamespace(run=fresh)
runpy.run_path(sys.argv[1])["main"](sys.argv[2:])
"""


@pytest.fixture(scope="module")
def sharded(forks: Any) -> Iterator[Callable[..., Any]]:
    """Run a recipe sharded over two processes, which stay: torch plans each operation on shards of new shapes once."""

    def run(name: str, *words: str, **environment: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for key, value in (FSDP | environment).items():
                patch.setenv(key, value)
            done = forks.run(KEPT, str(ROOT / "train" / f"{name}.py"), *words, processes=2, kept=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    yield run
    forks.run("raise SystemExit('the last job')", processes=2, kept=True)


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
            if "accuracy" not in key:  # where margins are almost 0 it is a matter of rounding
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
    settings += ["hooks.checkpoint_every=0"]
    recipe("diffusion_dpo", *settings, f"run.folder={tmp_path / 'one'}", "trainer.grad_accum=4")
    verify = f"hooks.verify_export={str(rank > 0).lower()}"
    done = sharded("diffusion_dpo", *settings, f"run.folder={tmp_path / 'two'}", "trainer.grad_accum=2", verify)
    assert "of a network sharded over 2 processes" in done.stdout
    assert ("verified in a fresh process" in done.stdout) == (rank > 0)
    same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(("kind", "rank"), [("sharded", 0), ("sharded", 2), ("two_processes", 0)])
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


WATCHED = ["monitor.every=2", "monitor.prompt_count=3", "hooks.ema_decay=0.9", *GRID]
ONLINE = ["--config=playground", "hooks.verify_export=false", "optimizer.lr_warmup_steps=0", "data.batch_size=2"]
ONLINE += ["hooks.checkpoint_every=0", "trainer.steps=2", "optimizer.eps=1e-4", "data.limit=16"]
FEW = ["sampler.steps=4", "algorithm.first_step=1", "algorithm.start_weight=1"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("diff_instruct_star", ["algorithm.aux_rounds=1", *WATCHED]),
        ("diff_instruct_star", ["algorithm.aux_rounds=1", "backbone.lora_rank=0", "teacher.lora_rank=0"]),
        ("refl", ["hooks.sample_every=0", "monitor.every=2", "monitor.prompt_count=5", *FEW]),
    ],
    ids=["two players share a network", "three networks", "steps that differ between processes"],
)
def test_online_recipes_sharded(
    tmp_path: Path, small: Path, recipe: Callable, sharded: Callable, name: str, settings: list[str]
) -> None:
    """Several players; a monitor with an odd number of prompts; equally many forward passes on all processes."""
    paths = ["backbone.path", "teacher.path"] if name == "diff_instruct_star" else ["backbone.path"]
    words = [*ONLINE, *settings, *(f"{path}={small}" for path in paths), "sampler.law=renoise"]
    recipe(name, *words, f"run.folder={tmp_path / 'one'}", "trainer.grad_accum=2")
    sharded(name, *words, f"run.folder={tmp_path / 'two'}")
    same(tmp_path / "one", tmp_path / "two", loss=1e-4, weight=1e-4)


def test_offloaded_references_and_inversions_of_other_lengths(
    tmp_path: Path, recipe: Callable, sharded: Callable
) -> None:
    settings = [*SMALL, "backbone.lora_rank=0", "inversion.steps=3", "algorithm.invert_by=reference"]
    settings += ["trainer.steps=2", "optimizer.eps=1e-4", "hooks.checkpoint_every=0", "algorithm.beta=100"]
    recipe("inpo", *settings, f"run.folder={tmp_path / 'one'}", "trainer.grad_accum=2")
    sharded("inpo", *settings, f"run.folder={tmp_path / 'two'}", FSDP_OFFLOAD_PARAMS="true")
    same(tmp_path / "one", tmp_path / "two")


def test_half_precision_with_whole_weights_between_the_passes(tmp_path: Path, forks: Any, sharded: Callable) -> None:
    """As ZeRO-2. The first loss is ln 2; then the gradients have rounding errors of equal size, but not the same."""
    settings = [*SMALL, *GRID, "backbone.lora_rank=0", "run.mixed_precision=bf16", "hooks.ema_decay=0.9"]
    settings += ["backbone.gradient_checkpointing=true", "trainer.steps=3", "optimizer.lr=1e-4"]
    settings += ["hooks.checkpoint_every=0", "optimizer.eps=1e-4"]
    script = str(ROOT / "train/diffusion_dpo.py")
    done = forks.run(RECIPE, script, *settings, f"run.folder={tmp_path / 'one'}", "trainer.grad_accum=2")
    assert done.returncode == 0, done.stderr[-3000:]
    sharded("diffusion_dpo", *settings, f"run.folder={tmp_path / 'two'}", FSDP_RESHARD_AFTER_FORWARD="false")
    one, two = ([row["policy/loss"] for row in metrics(tmp_path / name)] for name in ("one", "two"))
    assert two[0] == pytest.approx(math.log(2), abs=1e-6) and two == pytest.approx(one, abs=0.02)
    names = {file.name for file in (tmp_path / "two/samples").iterdir()}
    assert names == {file.name for file in (tmp_path / "one/samples").iterdir()}


def test_algorithms_with_uneven_passes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = object.__new__(PSOCustomization)
    algorithm.players = {"policy": torch.nn.Linear(1, 1)}
    check_even_passes(algorithm)
    monkeypatch.setattr(recipe_parts, "is_sharded", lambda module: True)
    with pytest.raises(ValueError, match=r"PSOCustomization .* FSDP2 needs equal ones; train it with DDP"):
        check_even_passes(algorithm)


@pytest.mark.parametrize("file", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_configs_ask_for_what_works(file: Path) -> None:
    """Through accelerate's own launcher, which turns them into environment variables."""
    launch = pytest.importorskip("accelerate.commands.launch")
    arguments = launch.launch_command_parser().parse_args([f"--config_file={file}", "script.py"])
    arguments, _, _ = launch._validate_launch_command(arguments)
    asked = prepare_multi_gpu_env(arguments) if "gpus" in file.stem or "nodes" in file.stem else {}
    check_launch(asked, None)
    assert (asked.get("ACCELERATE_USE_FSDP") == "true") == file.stem.endswith("_fsdp")
    world = {"two_gpus": 2, "eight_gpus": 8, "two_nodes": 16}.get(file.stem.removesuffix("_fsdp"), 1)
    assert arguments.num_processes == world and arguments.num_machines == (2 if "nodes" in file.stem else 1)
