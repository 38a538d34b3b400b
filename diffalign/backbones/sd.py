"""Stable Diffusion 1.x and 2.x (`StableDiffusionPipeline`): U-Net, one CLIP text encoder, eps- or v-prediction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from diffalign.backbones.base import Backbone, Denoiser
from diffalign.lora import lora_layers
from diffalign.reference import frozen
from diffalign.schedule import VPSchedule
from diffalign.types import Cond


class SDDenoiser(Denoiser):
    """A UNet2DConditionModel that reads its text embedding from `cond.tokens`."""

    def __init__(self, network: UNet2DConditionModel):
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """[B, C, h, w], t [B] int64 in [0, 999], tokens [B, L, D] -> float32 [B, C, h, w]."""
        dtype = self.network.dtype
        return self.network(x_t.to(dtype), t, cond.tokens.to(dtype), return_dict=False)[0].float()


class SDBackbone(Backbone):
    """A StableDiffusionPipeline folder taken apart.

    dtype is that of the autoencoder and the text encoder, which never train.
    """

    denoiser: SDDenoiser

    def __init__(self, path: Path, fingerprint: str, device: torch.device, dtype: torch.dtype):
        self.path, self.fingerprint, self.device, self.dtype = path, fingerprint, device, dtype
        network = UNet2DConditionModel.from_pretrained(path, subfolder="unet")
        self.denoiser = SDDenoiser(_to(network, device, torch.float32).to(memory_format=torch.channels_last))
        self.schedule = VPSchedule.from_config(json.loads((path / "scheduler/scheduler_config.json").read_text()))
        self._vae: AutoencoderKL | None = None
        self._tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
        self._text: CLIPTextModel | None = None

    @property
    def vae(self) -> AutoencoderKL:
        if self._vae is None:
            vae = AutoencoderKL.from_pretrained(self.path, subfolder="vae")
            self._vae = frozen(_to(vae, self.device, self.dtype))
        return self._vae

    @property
    def text_encoder(self) -> CLIPTextModel:
        if self._text is None:
            text = CLIPTextModel.from_pretrained(self.path, subfolder="text_encoder")
            self._text = frozen(_to(text, self.device, self.dtype))
        return self._text

    def release(self) -> None:
        self._vae = self._text = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Cond:
        ids = self._tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return Cond(self.text_encoder(ids.to(self.device))[0].float())

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.device, self.dtype) * 2 - 1
        return self.vae.encode(pixels).latent_dist.mode().float() * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.dtype) / self.vae.config.scaling_factor
        return (self.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        config = json.loads((self.path / "vae/config.json").read_text())
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        if resolution % factor:
            raise ValueError(
                f"'data.resolution' = {resolution} is not a multiple of {factor}, the autoencoder's factor"
            )
        return config["latent_channels"], resolution // factor, resolution // factor

    def pipeline(self, network: UNet2DConditionModel) -> StableDiffusionPipeline:
        pipeline = StableDiffusionPipeline.from_pretrained(
            self.path,
            unet=network,
            vae=self.vae,
            text_encoder=self.text_encoder,
            safety_checker=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save(self, folder: Path) -> None:
        network = self.denoiser.network
        if not lora_layers(network):
            self.pipeline(network).save_pretrained(folder)
            return
        StableDiffusionPipeline.save_lora_weights(
            folder, get_peft_model_state_dict(network), **_collate_lora_metadata({"unet": network})
        )


def _to(module: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Moved; cast only where needed, since diffusers warns about every cast."""
    return module.to(device) if module.dtype == dtype else module.to(device, dtype)
