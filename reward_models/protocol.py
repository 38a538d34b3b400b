"""What a scorer is, and the check of its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

TOLERANCE = 1e-3
"""How far outside [0, 1] a value may lie: half precision and resizing overshoot by less."""


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores images. Larger is better.

    differentiable  whether gradients flow from the scores to the pixels
    unit            the scale of the scores; stored with every result

    A scorer that is an `nn.Module` is moved to the device it is loaded on and gets its images there; any other gets
    them on its attribute `device` if it has one, else on the CPU.
    """

    differentiable: bool
    unit: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B, 3, H, W] float in [0, 1] and B prompts -> float32 [B]."""


@runtime_checkable
class Resizing(Protocol):
    """A scorer whose network sees one size: the command then makes full batches out of images of mixed sizes.

    `score(images, prompts)` equals `score_pixels(preprocess(images), prompts)`.
    """

    def preprocess(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] float in [0, 1], any H and W -> [B, 3, h, w] for the network, h and w always the same."""

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """What `preprocess` made and B prompts -> float32 [B]."""


def check_images(images: Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError unless images are [B, 3, H, W] float in [0, 1] and there are B prompts."""
    what = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
    expected = "images must be float in [0, 1] with shape [B, 3, H, W]; got"
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"{expected} {what}")
    low, high = torch.stack(images.detach().aminmax()).tolist()
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(f"{expected} {what} with values from {low:.3g} to {high:.3g}")
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise ValueError(
            f"one prompt for each image is needed; got {prompts if isinstance(prompts, str) else len(prompts)!r} "
            f"for {len(images)} images"
        )
