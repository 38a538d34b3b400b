"""The scripts of examples/ run and give the documented results."""

from __future__ import annotations

import csv
import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reward_models import load_scorer
from reward_models.folder import cli

EXAMPLES = Path(__file__).parent.parent / "examples"
SCORER = "custom_scorer:Colourfulness"


def example(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_every_example_is_tried_here() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {"align", "score", "custom_scorer"}


def test_align_from_python(tmp_path: Path) -> None:
    example("align")["align"](str(tmp_path), steps=2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["policy/loss"] == pytest.approx(0.693147, abs=1e-5)  # policy equals reference: ln 2
    (weights,) = (tmp_path / "export").glob("pytorch*.safetensors")
    assert any(tensor.any() for name, tensor in load_file(weights).items() if "lora_B" in name)


def test_score_from_python(pairs_file: Path) -> None:
    """Each score equals that of the image alone; the largest comes first."""
    prompt = "large red circle on white"
    ranked = example("score")["rank"](str(pairs_file.parent), prompt)
    assert len(ranked) == 48 and [score for score, _ in ranked] == sorted((s for s, _ in ranked), reverse=True)
    best, file = ranked[0]
    assert load_scorer("playground_hps").score_images([file], [prompt]).item() == pytest.approx(best, abs=1e-4)


@pytest.fixture
def custom(monkeypatch: pytest.MonkeyPatch) -> str:
    """Spec of the example's scorer, with its folder on PYTHONPATH."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return SCORER


def test_custom_scorer_by_hand(custom: str) -> None:
    """Half red, half green: rg = +-1 and yb = 1/2, so the variances are 1 and 0, the means 0 and 1/2: 1 + 0.3 / 2.

    Grey has neither, and its gradient is finite.
    """
    image = torch.zeros(2, 3, 4, 4)
    image[0, 0, :, :2] = image[0, 1, :, 2:] = 1
    image[1] = 0.5
    image.requires_grad_()
    scores = load_scorer(custom).score(image, ["", ""])
    assert torch.allclose(scores, torch.tensor([1.15, 0.0]), atol=1e-5)
    scores.sum().backward()
    assert image.grad is not None and image.grad.isfinite().all() and image.grad[0].any()
    half = load_scorer(f"{custom},mean_weight=0.5").score(image.detach(), ["", ""])
    assert half[0] == pytest.approx(1.25, abs=1e-5)


def test_custom_scorer_scores_a_folder(custom: str, pairs_file: Path, tmp_path: Path) -> None:
    folder, out = str(pairs_file.parent), tmp_path / "scores.csv"
    assert cli.main([folder, "--prompt", "", "--scorer", custom, "--out", str(out)]) == 0
    scores = [float(row[custom]) for row in csv.DictReader(out.open())]
    assert len(scores) == 48 and min(scores) > 0


def test_custom_scorer_is_the_reward_of_a_recipe(custom: str, recipe: Callable, tmp_path: Path) -> None:
    tiny = ["data.limit=4", "data.batch_size=4", "trainer.steps=2", "monitor.prompt_count=2", "hooks.sample_every=0"]
    tiny += ["hooks.verify_export=false", f"reward.scorers=[{custom}]", f"run.folder={tmp_path}"]
    recipe("refl", "--config", "playground", *tiny)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 0]  # the monitor measures before the first step
    assert len(steps) == 2 and all(row["policy/reward"] > 0 < row["policy/reward_gradient"] for row in steps)
