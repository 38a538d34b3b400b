"""The report card of a playground pipeline: what the exact judge measures on its samples, and a picture of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid, save_image

from diffalign.playground.judge import Judge
from diffalign.playground.world import SIZE, captions, imagine, parse

BATCH = 64
ENLARGED = 3
"""Every pixel of a sample is drawn as a square of so many."""


def report_card(
    pipeline: DiffusionPipeline,
    grid: Path | None = None,
    *,
    n: int = 512,
    guidance: float = 1.0,
    steps: int = 10,
    **more: int,
) -> dict[str, float]:
    """Score (mean and standard deviation) and mean of each aspect on n samples of held-out combinations.

    grid: where to draw the first 64 of them. more: further arguments of the pipeline's call.
    """
    prompts, judge = captions(n, held_out=True), Judge()
    images = samples(pipeline, prompts, guidance=guidance, steps=steps, **more)
    if grid:
        save_image(enlarged(images[:64]), grid)
    score, measured = judge.score(images, prompts), judge.measure(images, prompts)
    card = {"score": score.mean(), "score_sd": score.std(correction=0), **{k: v.mean() for k, v in measured.items()}}
    about = {"held_out_samples": n, "guidance": guidance, "steps": steps, **more}
    return about | {name: round(value.item(), 4) for name, value in card.items()}


def samples(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    guidance: float = 1.0,
    steps: int = 10,
    seed: int = 0,
    **more: int,
) -> Tensor:
    """One image of each prompt, float32 [N, 3, SIZE, SIZE] in [0, 1].

    more: further arguments of the pipeline's call.
    """
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "height": SIZE, "width": SIZE, **more}
    images = []
    for i in range(0, len(prompts), BATCH):
        some, g = list(prompts[i : i + BATCH]), torch.Generator().manual_seed(1_000_003 * seed + i)
        noise = torch.randn(BATCH, 4, SIZE // 2, SIZE // 2, generator=g)[: len(some)]
        images.append(pipeline(some, latents=noise, generator=g, output_type="pt", **call).images.float())
    return torch.cat(images)


def enlarged(images: Tensor, *, columns: int = 16) -> Tensor:
    """Images [B, 3, H, W] side by side, every pixel a square, [3, h, w]."""
    grid = make_grid(images, nrow=columns, padding=1)
    return F.interpolate(grid[None], scale_factor=ENLARGED, mode="nearest")[0]


def best_reachable(*, renders: int = 64, n: int = 512) -> float:
    """Mean over n held-out captions of the judge's best of so many renders."""
    prompts = captions(n, held_out=True)
    asked = [parse(p) for p in prompts]
    scores = [Judge().score(imagine(asked, seed=10**7 + k).render(), prompts) for k in range(renders)]
    return round(torch.stack(scores).amax(0).mean().item(), 4)
