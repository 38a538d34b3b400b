"""Every recipe on fixed preferences, with every model family, and with two processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stock import changed_by

FAMILIES = ("tiny_sdxl", "tiny_flux", "tiny_z_image", "tiny_sana", "tiny_flux2_klein", "tiny_qwen_image")
RECIPES = ("diffusion_dpo", "inpo", "rank_dpo", "kto", "mapo", "sft")
TINY = ["hooks.sample_every=0", "hooks.checkpoint_every=0", "hooks.verify_export=false", "run.log_every=1"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_on_every_family(
    tmp_path: Path, request: pytest.FixtureRequest, pairs_file: Path, recipe: Callable, family: str, name: str
) -> None:
    """Two steps of a LoRA; stock diffusers loads the export, and its images change. The equality of images to 1e-4 is
    tested in tests/networks/families/test_every_family.py.
    """
    model, out = request.getfixturevalue(family), tmp_path / "run"
    settings = [f"backbone.path={model}", "backbone.lora_rank=2", "backbone.max_sequence_length=8", "optimizer.lr=1e-2"]
    settings += [f"run.folder={out}", f"data.path={pairs_file}", "data.batch_size=2", "data.limit=4", "trainer.steps=2"]
    recipe(name, "--config=playground", *settings, *TINY, "optimizer.lr_warmup_steps=0")
    losses = [json.loads(line)["policy/loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert changed_by(out / "export", model)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "tiny_sdxl"])
def test_exports_of_flows_are_verified(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    pairs_file: Path,
    recipe: Callable,
    capsys: pytest.CaptureFixture[str],
    family: str,
) -> None:
    model = request.getfixturevalue(family)
    settings = [f"backbone.path={model}", "backbone.lora_rank=2", f"run.folder={tmp_path / 'run'}"]
    settings += [
        f"data.path={pairs_file}",
        "data.batch_size=2",
        "data.limit=4",
        "trainer.steps=1",
        "hooks.sample_steps=2",
    ]
    recipe("sft", "--config=playground", *settings, "hooks.sample_every=1", "hooks.checkpoint_every=0")
    assert "verified in a fresh process: stock diffusers loads" in (said := capsys.readouterr().out), said
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "diffusion_dpo"])
def test_two_processes_equal_one(
    tmp_path: Path, pairs_file: Path, tiny_sd: Path, recipe: Callable, two_processes: Callable, name: str
) -> None:
    """Two processes with four samples each against one with eight: KTO's reference point is the mean over all eight."""
    more = [f"data.path={pairs_file}", "trainer.steps=2", *TINY, "data.draws_per_sample=null"]
    # MaPO's margins are log-odds of likelihoods, which enlarge rounding where errors are as large as a random model's.
    more += [f"backbone.path={tiny_sd}"] if name != "mapo" else []
    # Margins are beta/2 times an error, and errors of a batch of 8 and of 4 agree to some 1e-8.
    more += ["algorithm.beta=10"] if name in ("inpo", "rank_dpo", "kto") else []
    more += ["optimizer.lr=3e-4"]  # AdamW's first steps are of that size, also where a gradient is rounding alone
    one, two = tmp_path / "one", tmp_path / "two"
    recipe(name, "--config=playground", f"run.folder={one}", "data.batch_size=8", *more)
    launched = two_processes(name, "--config=playground", f"run.folder={two}", "data.batch_size=4", *more)
    assert launched.returncode == 0, launched.stderr[-3000:]
    rows = [[json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, two)]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        for key in (k for k in a if not k.startswith("perf/")):
            assert a[key] == pytest.approx(b[key], abs=1e-5, rel=1e-4), (a["step"], key)
    first, second = (load_file(next((folder / "export").glob("pytorch*.safetensors"))) for folder in (one, two))
    assert all(torch.allclose(first[k], second[k], atol=1e-5) for k in first)
