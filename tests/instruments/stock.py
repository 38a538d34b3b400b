"""Pipelines of stock diffusers, and their images for the tests' prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffalign.networks.loading import call_of


def stock(path: Path) -> Any:
    """Loaded by stock diffusers, which needs the omitted parts of a folder as arguments."""
    left_out = {k: None for k, v in json.loads((path / "model_index.json").read_text()).items() if v == [None, None]}
    pipeline = DiffusionPipeline.from_pretrained(path, **left_out)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline: Any, prompt: str | list[str], steps: int, **more: Any) -> torch.Tensor:
    """Images of 32 pixels without guidance."""
    call = {"num_inference_steps": steps, "height": 32, "width": 32, "output_type": "pt"}
    call |= call_of(pipeline).guidance_call(1)
    return pipeline(prompt=prompt, **call | more).images
