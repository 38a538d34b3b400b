"""Samples of a model while it trains, a few at a time, and the grid of some of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import save_image

from diffalign.networks.families.base import Backbone
from diffalign.networks.sampler import Sampler
from diffalign.training.run import Run
from diffalign.training.trainer import Hook, Trainer
from diffalign.types import Cond, Key
from reward_models.files import replacing, writing

PIXELS = 8 * 512 * 512
"""How many are sampled at a time; their decoding is bounded by the backbone."""


@torch.no_grad()
def drawn(backbone: Backbone, sampler: Sampler, cond: Cond, keys: Sequence[Key]) -> Iterator[Tensor]:
    """What the denoiser draws for a cond and keys of batch B, a few images [b, 3, H, W] in [0, 1] at a time."""
    width = backbone.factor * sampler.shape[-1]
    size = max(1, PIXELS // width**2)
    for i in range(0, len(keys), size):
        some = keys[i : i + size]
        x0 = sampler.sample(backbone.denoiser, cond.at(torch.arange(i, i + len(some))), some)
        yield backbone.decode(x0)


class SampleGrid(Hook):
    """Draws the same prompts from the same noise every so many steps, step 0 first: `samples/step-000500.png`.

    Raises FloatingPointError when a sample is not finite, which a PNG would show as black.
    """

    def __init__(
        self, run: Run, backbone: Backbone, averaged: Any, every: int, prompts: Sequence[str], sampler: Sampler
    ):
        self.run, self.backbone, self.averaged = run, backbone, averaged
        self.every, self.prompts, self.sampler = every, prompts, sampler
        self.cond = backbone.encode_text(prompts)
        self.columns = max(1, round(len(prompts) ** 0.5))

    def start(self, trainer: Trainer) -> None:
        if trainer.step == 0:
            self.draw(0)

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step % self.every == 0 or trainer.last:
            self.draw(trainer.step)

    def draw(self, step: int) -> None:
        if self.run.main:
            with self.averaged():
                parts = [part.cpu() for part in drawn(self.backbone, self.sampler, self.cond, self.prompts)]
            images = torch.cat(parts)
            if not torch.isfinite(images).all():
                cure = "lower 'optimizer.lr'" if step else "look at the weights and the scheduler of 'backbone.path'"
                raise FloatingPointError(
                    f"the sample grid of step {step} is not finite: {cure}, or choose another 'run.mixed_precision'"
                )
            with replacing(self.run.folder / "samples" / f"step-{step:06d}.png") as temporary, writing(temporary):
                save_image(images, temporary, format="png", nrow=self.columns, padding=1)
            self.backbone.release()
        self.run.accelerator.wait_for_everyone()
