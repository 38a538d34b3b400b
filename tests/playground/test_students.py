"""The shipped few-step models: stock diffusers loads them with their scheduler, and images match their captions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline

from diffalign.playground import STUDENTS, Judge
from diffalign.playground.world import captions


def test_both_together_are_small() -> None:
    assert sum(f.stat().st_size for folder in STUDENTS.values() for f in folder.rglob("*") if f.is_file()) < 8e6


@pytest.mark.parametrize("steps", STUDENTS)
def test_a_student_draws_held_out_combinations(steps: int) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(STUDENTS[steps]).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, LCMScheduler)
    prompts = captions(96, held_out=True)
    noise = torch.randn(96, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    call = {"num_inference_steps": steps, "guidance_scale": 1.0, "height": 32, "width": 32, "output_type": "pt"}
    images = pipeline(prompts, latents=noise, generator=torch.Generator().manual_seed(0), **call).images
    seen = {aspect: values.mean().item() for aspect, values in Judge().measure(images.float(), prompts).items()}
    assert all(seen[aspect] >= 0.95 for aspect in ("colour", "background", "size")) and seen["shape"] >= 0.9, seen


def test_distillation_runs_from_its_shipped_config(tmp_path, recipe: Callable) -> None:
    settings = [f"run.folder={tmp_path / 'run'}", "trainer.steps=2", "data.batch_size=2", "data.limit=4"]
    recipe("distill", "--config=playground", *settings, "hooks.sample_every=2", "hooks.checkpoint_every=0")
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2
