"""A LoRA in the names that ComfyUI, kohya's sd-scripts and AUTOMATIC1111 read, for `export/comfyui.safetensors`.

U-Nets have kohya's names: lora_unet_<layer>.lora_down.weight, .lora_up.weight and .alpha. Transformers have those of
diffusers: transformer.<layer>.lora_A.weight and .lora_B.weight. There lora_B contains alpha / rank, because diffusers
reads no .alpha for SD3.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor

from diffalign.networks.families.base import Backbone
from diffalign.networks.lora import GENERATOR

FILE = "comfyui.safetensors"


def save_comfyui(backbone: Backbone, state: Mapping[str, Tensor], folder: Path, trigger: str | None) -> None:
    """Write `comfyui.safetensors`. state: the LoRA as `get_peft_model_state_dict` gives it."""
    config = backbone.denoiser.network.peft_config[GENERATOR]
    rank, alpha = config.r, float(config.lora_alpha)
    named = {f"{backbone.network_name}.{name}": value for name, value in state.items()}
    if backbone.network_name == "unet":
        tensors = convert_state_dict_to_kohya(named)  # with the rank as alpha
        tensors |= {name: torch.tensor(alpha) for name in tensors if name.endswith(".alpha")}
    else:
        tensors = {name: value * (alpha / rank if ".lora_B." in name else 1) for name, value in named.items()}
    version, architecture = backbone.published_names
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha if backbone.network_name == "unet" else float(rank)),
        "ss_base_model_version": version,
        "ss_sd_model_name": backbone.source.name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": folder.parent.name,
    }
    if trigger is not None:
        metadata |= {"modelspec.trigger_phrase": trigger, "ss_trigger_words": trigger}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / FILE, metadata)
