"""Images as the patches of Qwen's vision-language models, differentiably and byte-exact with Pillow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reward_models.preprocess import CLIP_MEAN, CLIP_STD, resize

MOST_NARROW = 200
"""Largest ratio of the sides of an image."""


@dataclass(frozen=True)
class Patches:
    """Image sizing of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: sides are multiples of patch * merge, patches are flattened.

    patch      side of a patch, pixels
    merge      patches along each side of an image token
    least      smallest number of pixels of the resized image
    most       largest number of pixels of the resized image. Only one of the two bounds is applied
    mean, std  normalisation of each channel
    """

    patch: int = 14
    merge: int = 2
    least: int = 4 * 28 * 28
    most: int = 16384 * 28 * 28
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @classmethod
    def of(cls, images: Any, *, least: int = 4, most: int = 16384) -> Patches:
        """The sizing for an image processor of transformers. least and most count image tokens; the default is that of
        qwen-vl-utils, with which the authors of scorers resize."""
        area = (images.patch_size * images.merge_size) ** 2
        mean, std = (tuple(map(float, x)) for x in (images.image_mean, images.image_std))
        return cls(images.patch_size, images.merge_size, least * area, most * area, mean, std)  # type: ignore[arg-type]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize. Raises ValueError for images narrower than 1:200."""
        if max(height, width) > MOST_NARROW * min(height, width):
            raise ValueError(f"an image of {width} x {height} is narrower than 1:{MOST_NARROW}; crop it")
        unit = self.patch * self.merge
        to = [round(side / unit) * unit for side in (height, width)]
        if to[0] * to[1] > self.most:
            scale = math.sqrt(height * width / self.most)
            to = [max(unit, math.floor(side / scale / unit) * unit) for side in (height, width)]
        elif to[0] * to[1] < self.least:
            scale = math.sqrt(self.least / (height * width))
            to = [math.ceil(side * scale / unit) * unit for side in (height, width)]
        return to[0], to[1]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] float in [0, 1] -> patches float32 [B * h * w, 6 * patch^2] and grids (1, h, w), int64 [B, 3].

        A patch is repeated: the networks read pairs of video frames.
        """
        height, width = self.size(*images.shape[-2:])
        # In grey levels, as transformers computes it: the same rounding.
        levels = resize(images.float(), (height, width)) * 255
        mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) * 255 for x in (self.mean, self.std))
        pixels, p, m = (levels - mean) / std, self.patch, self.merge
        h, w = height // p, width // p
        pixels = pixels.view(-1, 1, 3, h // m, m, p, w // m, m, p).expand(-1, 2, -1, -1, -1, -1, -1, -1, -1)
        patches = pixels.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 6 * p * p)
        return patches, torch.tensor([[1, h, w]] * len(images), device=images.device)

    def tokens(self, height: int, width: int) -> int:
        """Number of image tokens of an image."""
        height, width = self.size(height, width)
        return height * width // (self.patch * self.merge) ** 2
