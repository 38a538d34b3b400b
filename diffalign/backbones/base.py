"""What every model family looks like from outside: one trainable denoiser, everything else frozen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.schedule import VPSchedule
from diffalign.types import Cond


class Denoiser(nn.Module, ABC):
    """The trainable network in one common shape. `network` is the diffusers model it wraps."""

    network: Any

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """[B, C, h, w], t [B], cond of batch B -> the network's prediction [B, C, h, w]."""


class Backbone(ABC):
    """A pretrained text-to-image pipeline taken apart. Encoders and decoder load when first used, `release` drops them.

    denoiser     the trainable network
    schedule     its noise schedule
    fingerprint  changes with the weights and settings that decide latents and text embeddings
    path         the diffusers folder it came from
    dtype        of the weights that never train
    """

    denoiser: Denoiser
    schedule: VPSchedule
    fingerprint: str
    path: Path
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Cond:
        """B prompts -> a Cond with batch axis B. Long prompts are cut at the text encoder's length."""

    @abstractmethod
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> scaled latents [B, C, h, w], the mean of the posterior."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> pixels [B, 3, H, W] in [0, 1], differentiable."""

    @abstractmethod
    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square image of `resolution` pixels."""

    @abstractmethod
    def pipeline(self, network: Any) -> Any:
        """The stock diffusers pipeline around `network`, sharing the encoders of this backbone."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the denoiser's present weights in diffusers layout: a LoRA file, or the whole pipeline."""

    @abstractmethod
    def release(self) -> None:
        """Free the autoencoder and the text encoder; they load again when used."""
