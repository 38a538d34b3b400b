"""A Stable Diffusion pipeline with few layers, for tests whose cost is that of the number of layers and tensors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel


def few_layers(tiny_sd: Path, folder: Path) -> Path:
    """tiny_sd with a U-Net of half as many tensors: a block down, a block up, both with attention."""
    shutil.copytree(tiny_sd, folder)
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,  # type: ignore[arg-type]
        up_block_types=("CrossAttnUpBlock2D",),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
    )
    unet.save_pretrained(folder / "unet")
    return folder
