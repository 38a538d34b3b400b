"""Runs on images of several shapes: the losses of square images, resuming, reference errors computed in advance."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.algorithms.denoising import Remembered
from diffalign.networks.families.sdxl import SDXLDenoiser
from diffalign.training.hooks.samples import SampleGrid
from diffalign.training.trainer import Trainer
from diffalign.types import Cond, LatentBatch

SHAPES = [(32, 32), (24, 32), (32, 24), (24, 40), (48, 64)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pairs of five shapes, which share four buckets."""
    folder, random = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    lines = []
    for k in range(10):
        for side in "wl":
            pixels = random.integers(0, 256, (*SHAPES[k % 5], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{k}{side}.png")
        lines.append(json.dumps({"prompt": "small red circle", "chosen": f"{k}w.png", "rejected": f"{k}l.png"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


def settings(folder: Path, pairs: Path, model: Path, *more: str) -> list[str]:
    shared = ["--config=playground", f"run.folder={folder}", f"data.path={pairs}", f"backbone.path={model}"]
    shared += ["backbone.lora_rank=2", "data.batch_size=2", "data.caption_dropout=0.5", "data.buckets=8"]
    shared += ["hooks.sample_every=0", "hooks.verify_export=false", "hooks.checkpoint_every=2", "run.log_every=1"]
    return [*shared, "optimizer.lr_warmup_steps=0", *more]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["policy/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_losses_of_square_images_are_bit_for_bit_those_without_buckets(
    tmp_path: Path, pairs_file: Path, tiny_sd: Path, recipe: Callable
) -> None:
    for name, buckets in (("with", "8"), ("without", "null")):
        words = settings(tmp_path / name, pairs_file, tiny_sd, "trainer.steps=3", f"data.buckets={buckets}")
        grid = ["hooks.sample_every=3", "hooks.sample_prompts=[blue]", "hooks.sample_steps=1"]
        recipe("diffusion_dpo", *words, *grid, "hooks.sample_width=48", "trainer.grad_accum=2")
        assert Image.open(tmp_path / name / "samples/step-000003.png").size == (48, 32)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_latents_of_several_shapes_are_remembered() -> None:
    """Two draws of four images; the square with the most values comes first."""
    kept = Remembered(np.zeros((2, 4), np.float32), np.zeros((2, 4, 2, 4, 4), np.float32))
    random, given = torch.Generator().manual_seed(0), []
    for draw, places, shape in ((0, [0, 1], (4, 4)), (1, [2, 3], (3, 5)), (1, [0, -1], (4, 4)), (0, [2, 3], (3, 5))):
        x = torch.randn(2, 2, *shape, generator=random)
        keys, group = [(draw, "a"), (draw, "b")], torch.tensor([0, 1])
        batch = LatentBatch(x, Cond(torch.zeros(2, 1, 1)), group, keys, torch.zeros(2), torch.zeros(2), places=places)
        kept.put(batch, x[:, 0, 0, 0], x)
        given.append((batch, [place >= 0 for place in places]))
    for batch, there in given:
        errors, latents = kept.at(batch)
        assert latents is not None and latents.shape == batch.x0.shape
        assert torch.equal(latents[there], batch.x0[there]) and torch.equal(errors[there], batch.x0[there, 0, 0, 0])


def test_a_resumed_run_with_errors_computed_in_advance_has_the_losses_of_one_without_and_sdxl_gets_true_sizes(
    tmp_path: Path, mixed: Path, tiny_sdxl: Path, recipe: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 steps of 2 pairs are less than two epochs, so no draw is repeated."""
    seen: set[tuple[int, ...]] = set()
    predict = SDXLDenoiser.predict

    def watched(self, x_t, t, cond):
        sizes = cond.size.int().tolist()
        assert all([4 * n for n in x_t.shape[2:]] == size[4:] for size in sizes)
        seen.update(map(tuple, sizes))
        return predict(self, x_t, t, cond)

    monkeypatch.setattr(SDXLDenoiser, "predict", watched)
    recipe("diffusion_dpo", *settings(tmp_path / "whole", mixed, tiny_sdxl, "trainer.steps=8"))
    parts = settings(tmp_path / "parts", mixed, tiny_sdxl, "data.draws_per_sample=2")
    recipe("diffusion_dpo", *parts, "trainer.steps=4")
    recipe("diffusion_dpo", *parts, "trainer.steps=8", "run.resume=true")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert seen == {(h, w, 0, 0, *((24, 32) if h == 48 else (h, w))) for h, w in SHAPES}


def test_online_recipes_draw_samples_of_the_width_and_height_given(
    tmp_path: Path, recipe: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(Trainer, "fit", lambda self, loader: found.append(self))
    recipe("draft", "--config=playground", f"run.folder={tmp_path}", "data.limit=2", "data.width=48", "sampler.steps=2")
    (trainer,) = found
    (grid,) = [hook for hook in trainer.hooks if isinstance(hook, SampleGrid)]
    grid.draw(1)
    assert trainer.algorithm.sampler.shape[1:] == (16, 24)
    assert Image.open(tmp_path / "samples/step-000001.png").size == (3 * 49 + 1, 3 * 33 + 1)


def test_sizes_that_the_model_cannot_take_are_refused_before_images_are_encoded(
    tmp_path: Path, mixed: Path, tiny_sd: Path, recipe: Callable
) -> None:
    with pytest.raises(ValueError, match=r"'data.buckets' = 4 is not a multiple of 8, as this model needs it"):
        recipe("diffusion_dpo", *settings(tmp_path, mixed, tiny_sd, "trainer.steps=1", "data.buckets=4"))
