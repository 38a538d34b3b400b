"""Recipes that train scorers: their files, exact resume, and the trainable weights of HPSv2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from diffalign.playground.ratings import RATED, write_ratings
from diffalign.training.hooks.logit_scale import LimitLogitScale
from diffalign.training.optim import make_player
from reward_models import load_scorer
from reward_models.training import HPS_TRAINS, clip_to_train, train_only


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ratings(tmp_path_factory.mktemp("ratings"), 24, seed=3)


def _arguments(folder: Path, ratings: Path, *more: str) -> list[str]:
    data = [f"data.path={ratings}", "data.batch_size=4", "data.validation_share=0.3"]
    steps = ["trainer.steps=4", "hooks.checkpoint_every=2", "hooks.validate_every=2", "run.log_every=1"]
    return ["--config=playground", f"run.folder={folder}", *data, *steps, *more]


@pytest.mark.parametrize("name", ["hps", "vp_score"])
def test_a_scorer_is_trained_validated_exported_and_resumed_exactly(
    name: str, tmp_path: Path, ratings: Path, recipe: Callable
) -> None:
    """4 steps = 2 + resume + 2, bit for bit: weights, metrics, validation."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe(name, *_arguments(whole, ratings))
    recipe(name, *_arguments(parts, ratings, "trainer.steps=2"))
    recipe(name, *_arguments(parts, ratings, "run.resume=true"))
    rows = [json.loads(x) for x in (whole / "validation.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 2, 4] and all(r["pairs"] == rows[0]["pairs"] > 0 for r in rows)
    assert (whole / "validation.jsonl").read_text() == (parts / "validation.jsonl").read_text()
    ours, theirs = (load_file(f / "checkpoints/step-000004/trained_0.safetensors") for f in (whole, parts))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    for folder in (whole, parts):
        metrics = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [m["step"] for m in metrics] == [1, 2, 3, 4]
        aspect = "overall" if name == "hps" else RATED[0]
        assert 0 <= metrics[-1][f"scorer/accuracy/{aspect}"] <= 1 and metrics[-1]["scorer/logit_std"] > 0
    scorer = load_scorer(str(whole / "export"))
    images = torch.rand(3, 3, 40, 32, generator=torch.Generator().manual_seed(0))
    scores = scorer.score(images, ["red circle on white"] * 3)
    assert scores.shape == (3,) and scores.isfinite().all() and scores.std() > 0


def test_training_stops_early_without_better_validation(tmp_path: Path, ratings: Path, recipe: Callable) -> None:
    """With lr 0 nothing changes, so it stops after the two validations of `patience`, at step 4 of 100."""
    arguments = _arguments(tmp_path, ratings, "trainer.steps=100", "optimizer.lr=0", "hooks.patience=2")
    recipe("hps", *arguments)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert [json.loads(x)["step"] for x in (tmp_path / "validation.jsonl").read_text().splitlines()] == [0, 2, 4]


def test_number_of_parameters_that_hpsv2_trains() -> None:
    """Of ViT-H-14's 986,109,441 parameters: 19 of 32 image blocks, ln_post and the projection; 11 of 24 text blocks,
    ln_final, the projection and the scale: 375,184,640 + 139,609,089."""
    with torch.device("meta"):
        network = torch.nn.ModuleDict({"clip": open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))})
    train_only(network, HPS_TRAINS)
    trains = {name: p.numel() for name, p in network.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in network.parameters()) == 986_109_441
    assert sum(trains.values()) == 514_793_729
    assert sum(n for name, n in trains.items() if name.startswith("clip.visual.")) == 375_184_640
    with pytest.raises(ValueError, match=r"clip\\.layer9 matches no parameter"):
        train_only(network, [*HPS_TRAINS, r"clip\.layer9"])


def test_training_changes_only_trainable_weights_and_clamps_the_logit_scale() -> None:
    torch.manual_seed(0)
    trains = (r"clip\.visual\.transformer\.resblocks\.2\..*", r"clip\.visual\.proj", r"clip\.logit_scale")
    scorer = clip_to_train(torch.device("cpu"), architecture="playground", weights=None, trains=trains)
    before = {name: p.detach().clone() for name, p in scorer.named_parameters()}
    player = make_player(scorer, lr=1.0, weight_decay=0.1, decay_vectors=False)
    decays = {g["weight_decay"]: {p.ndim < 2 for p in g["params"]} for g in player.optimizer.param_groups}
    assert decays == {0.1: {False}, 0.0: {True}}
    (-scorer(torch.rand(4, 3, 32, 32), ["a", "b", "a", "c"]).sum()).backward()
    player.optimizer.step()
    LimitLogitScale(scorer).after_step(None)
    moved = {name for name, p in scorer.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in scorer.named_parameters() if p.requires_grad}
    assert 0 <= scorer.clip.logit_scale.item() <= torch.tensor(100.0).log().item()
