"""Pipelines of stock diffusers, and their images for the tests' prompt."""

from __future__ import annotations

import json
from functools import cache
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


@cache
def shared(path: Path) -> Any:
    """`stock`, loaded once for all tests, which leave it as it is."""
    return stock(path)


@cache
def _unchanged(path: Path, prompt: str) -> torch.Tensor:
    return images(shared(path), prompt, 2, generator=torch.Generator().manual_seed(0))


def changed_by(export: Path, path: Path, prompt: str = "red circle") -> bool:
    """Whether stock diffusers loads the LoRA in `export`, and draws another image with it than without."""
    before, pipeline = _unchanged(path, prompt), shared(path)
    assert not pipeline.get_list_adapters()
    pipeline.load_lora_weights(export, weight_name="pytorch_lora_weights.safetensors")
    try:
        return not torch.equal(before, images(pipeline, prompt, 2, generator=torch.Generator().manual_seed(0)))
    finally:
        pipeline.unload_lora_weights()
