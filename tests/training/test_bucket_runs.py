"""Runs on images of several shapes: the losses of square images, resuming, reference errors computed in advance."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.networks.families.sdxl import SDXLDenoiser

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
        recipe("diffusion_dpo", *words, "trainer.grad_accum=2")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_a_resumed_run_continues_bit_for_bit_with_latents_of_all_shapes_inverted_in_advance(
    tmp_path: Path, mixed: Path, tiny_sd: Path, recipe: Callable
) -> None:
    words = [mixed, tiny_sd, "data.draws_per_sample=2", "algorithm.invert_by=reference", "inversion.steps=2"]
    recipe("inpo", *settings(tmp_path / "whole", *words, "trainer.steps=4"))
    recipe("inpo", *settings(tmp_path / "parts", *words, "trainer.steps=2"))
    recipe("inpo", *settings(tmp_path / "parts", *words, "trainer.steps=4", "run.resume=true"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    kept = np.fromfile(tmp_path / "whole/reference/latents.f32", np.float32).reshape(40, -1)
    filled = (kept != 0).sum(1)
    assert len({*filled.tolist()}) == 3 and filled.max() == kept.shape[1]  # 24 x 40 and 24 x 32 are smaller


def test_errors_computed_in_advance_are_those_of_training_and_sdxl_gets_true_sizes(
    tmp_path: Path, mixed: Path, tiny_sdxl: Path, recipe: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[int, ...]] = set()
    predict = SDXLDenoiser.predict

    def watched(self, x_t, t, cond):
        sizes = cond.size.int().tolist()
        assert all([4 * n for n in x_t.shape[2:]] == size[4:] for size in sizes)
        seen.update(map(tuple, sizes))
        return predict(self, x_t, t, cond)

    monkeypatch.setattr(SDXLDenoiser, "predict", watched)
    for draws in ("2", "null"):  # 8 steps of 2 pairs are less than two epochs
        words = settings(tmp_path / draws, mixed, tiny_sdxl, "trainer.steps=8", f"data.draws_per_sample={draws}")
        recipe("diffusion_dpo", *words)
    assert losses(tmp_path / "2") == losses(tmp_path / "null")
    expected = {(h, w, 0, 0, *([24, 32] if h == 48 else [h, w])) for h, w in SHAPES}
    assert seen == expected


def test_sizes_that_the_model_cannot_take_are_refused_before_images_are_encoded(
    tmp_path: Path, mixed: Path, tiny_sd: Path, recipe: Callable
) -> None:
    with pytest.raises(ValueError, match=r"'data.buckets' = 4 is not a multiple of 8, as this model needs it"):
        recipe("diffusion_dpo", *settings(tmp_path, mixed, tiny_sd, "trainer.steps=1", "data.buckets=4"))
