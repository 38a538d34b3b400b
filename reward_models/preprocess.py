"""Image preprocessing of scorers: resize, crop or pad, normalise. Differentiable and byte-exact with Pillow.

Published scorers were trained on 8-bit images resized by Pillow. Pillow filters rows and columns one after the other
and rounds to 8 bits after each. A resize of float tensors does not, and differs by up to 2 of 255 grey levels, at hard
edges by 11. Here both passes are matrices with Pillow's coefficients, with Pillow's rounding. Gradients are those of
the linear filter (straight-through rounding). So the score of a tensor equals the score of the saved image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from PIL import __version__ as PILLOW
from torch import Tensor
from torch.nn import functional as F

from reward_models.placement import upload

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Method = Literal["pil", "antialias", "plain"]
Interpolation = Literal["bicubic", "bilinear"]

BITS = 22
"""Pillow's coefficients are multiples of 2^-22."""
PROBES = 64
_PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}


@dataclass(frozen=True)
class ImageRule:
    """Preprocessing rule of a network.

    size           side of the square input, pixels
    resize         side that is resized to `size`: shortest, then crop the centre; longest, then pad; squash: both sides
    crop           rounding of the crop offset: torchvision half to even, transformers down
    method         pil: as Pillow resizes 8-bit images; antialias, plain: torchvision's resize of float tensors, with
                   and without antialias, as HPSv2's authors resize with new and old torchvision
    interpolation  filter
    clamp          clamp the overshoot of bicubic; for methods without rounding
    fill           grey value in [0, 1] of the padding, before normalisation
    mean, std      normalisation of each channel
    """

    size: int
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    crop: Literal["torchvision", "transformers"] = "torchvision"
    method: Method = "pil"
    interpolation: Interpolation = "bicubic"
    clamp: bool = True
    fill: float = 0.0
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] float in [0, 1], any H and W -> normalised float32 [B, 3, size, size], differentiably."""
        to = self.target(*images.shape[-2:])
        window = self._window(to)
        images = resize(images.float(), to, window, method=self.method, interpolation=self.interpolation)
        if self.clamp:
            images = images.clamp(0, 1)
        left, top, right, bottom = self._padding(to)
        images = F.pad(images, (left, right, top, bottom), value=round(255 * self.fill) / 255)
        mean, std = (upload(torch.tensor(x).view(3, 1, 1), images.device) for x in (self.mean, self.std))
        return (images - mean) / std

    def shrink(self, image: Image.Image) -> Image.Image:
        """An RGB image resized and cropped by Pillow.

        The rule gives the same output for it as for the full image, bit for bit. Decoder threads use it. Only valid if
        `method` is pil.
        """
        to = self.target(image.height, image.width)
        image = image.resize((to[1], to[0]), _PILLOW[self.interpolation])
        left, top, right, bottom = self._padding(to)
        if left or top or right or bottom:
            level = round(255 * self.fill)
            canvas = Image.new("RGB", (to[1] + left + right, to[0] + top + bottom), (level, level, level))
            canvas.paste(image, (left, top))
            image = canvas
        top, bottom, left, right = self._window(to)
        return image.crop((left, top, left + self.size, top + self.size))

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, before crop and padding."""
        if self.resize == "squash":
            return self.size, self.size
        if self.resize == "longest":
            scale = self.size / max(height, width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        short = min(height, width)  # torchvision and transformers round the longer side down
        return int(self.size * height / short), int(self.size * width / short)

    def _padding(self, to: tuple[int, int]) -> tuple[int, int, int, int]:
        vertical, horizontal = (max(self.size - side, 0) for side in to)
        left, top = horizontal // 2, vertical // 2
        return left, top, horizontal - left, vertical - top

    def _window(self, to: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, bottom, left and right of the crop in the resized image."""
        over = [max(side - self.size, 0) / 2 for side in to]
        top, left = (round(x) if self.crop == "torchvision" else int(x) for x in over)
        return top, min(top + self.size, to[0]), left, min(left + self.size, to[1])


def resize(
    images: Tensor,
    size: tuple[int, int],
    window: tuple[int, int, int, int] | None = None,
    *,
    method: Method = "pil",
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """[B, C, H, W] float in [0, 1] -> [B, C, h, w] float32 of size (h, w); differentiable.

    method pil gives the bytes of Pillow's resize of the 8-bit image, over 255; antialias and plain are torchvision's
    resize of the float tensor, which overshoots [0, 1]. window (top, bottom, left, right) is the part of the result
    to compute and return.
    """
    top, bottom, left, right = window or (0, size[0], 0, size[1])
    if method != "pil":
        if tuple(images.shape[-2:]) != tuple(size):
            mode = tv.InterpolationMode(interpolation)
            if 1 in size:  # torch mixes up channels of one-pixel-wide channels-last tensors, which decoding gives
                images = images.contiguous()
            images = tv.resize(images, list(size), mode, antialias=method == "antialias")
        return images[..., top:bottom, left:right]
    height, width = images.shape[-2:]
    plain = images.device.type == "cpu" and images.dtype == torch.float32 and not images.requires_grad
    if plain and not images.sum().isnan():
        return _by_pillow(images, size, interpolation)[..., top:bottom, left:right] / 255
    x = _straight_through(images * 255, lambda v: v.clamp(0, 255).round())
    for axis in pass_order(height, width, *size, interpolation):
        n, m, wanted = (width, size[1], (left, right)) if axis == -1 else (height, size[0], (top, bottom))
        if n == m:  # Pillow skips the pass
            x = x.narrow(axis, wanted[0], wanted[1] - wanted[0])
        else:
            x = _filter(x, bands(n, m, *wanted, interpolation), axis)
    return (x / 255).float()


def _by_pillow(x: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """float32 [B, C, H, W] in [0, 1] -> grey levels [B, C, h, w] by Pillow itself: faster, but without gradients."""
    pictures = x if x.shape[1] == 3 else x.flatten(0, 1)[:, None]
    resized = [np.asarray(_picture(p).resize(size[::-1], _PILLOW[interpolation])) for p in pictures.numpy()]
    levels = np.stack(resized).reshape(len(pictures), *size, -1)
    return torch.from_numpy(levels).permute(0, 3, 1, 2).reshape(*x.shape[:2], *size).float()


def _picture(x: np.ndarray) -> Image.Image:
    """float32 [3, H, W] or [1, H, W] in [0, 1] -> RGB or grey image. RGB is resized faster than three grey images."""

    def levels(part: np.ndarray) -> np.ndarray:
        return np.rint(np.clip(part * np.float32(255), 0, 255)).astype(np.uint8)

    if len(x) == 3 and x.strides[0] == x.itemsize:  # channels last, as decoding gives it
        return Image.fromarray(levels(x.transpose(1, 2, 0)))
    return Image.merge("RGB" if len(x) == 3 else "L", [Image.fromarray(levels(plane)) for plane in x])


def _filter(x: Tensor, blocks: Sequence[Band], axis: int) -> Tensor:
    """One pass of Pillow's resize along an axis, rounded to 8 bits. Always in float64, also under mixed precision."""
    parts = []
    for first, last, matrix in blocks:
        weights = upload(torch.from_numpy(matrix), x.device)
        part = x.narrow(axis, first, last - first).double()
        parts.append(part @ weights.T if axis == -1 else weights @ part)
    return _straight_through(torch.cat(parts, dim=axis), lambda v: (v + 0.5).floor().clamp(0, 255))


def _straight_through(x: Tensor, hard: Callable[[Tensor], Tensor]) -> Tensor:
    """The value of hard(x) with the gradient of x. Exact: float64 holds both sums of 22 binary places."""
    return x + (hard(x.detach()) - x.detach()) if x.requires_grad else hard(x)


class Band(NamedTuple):
    """Adjacent outputs of a filter: matrix [outputs, last - first] times the inputs first to last."""

    first: int
    last: int
    matrix: np.ndarray


BAND = 32
"""Outputs per band. Narrow bands have fewer zeros in a matrix, wide bands need fewer matrices."""


@lru_cache(maxsize=64)
def bands(n: int, m: int, start: int, stop: int, interpolation: Interpolation) -> tuple[Band, ...]:
    """Outputs start to stop of Pillow's filter from n pixels to m, as float64 matrices in multiples of 2^-22."""
    found = []
    for begin in range(start, stop, BAND):
        rows = [_weights(n, m, i, interpolation) for i in range(begin, min(begin + BAND, stop))]
        first, last = min(x for x, _ in rows), max(x + len(w) for x, w in rows)
        matrix = np.zeros((len(rows), last - first))
        for i, (x, weights) in enumerate(rows):
            matrix[i, x - first : x - first + len(weights)] = weights
        found.append(Band(first, last, matrix))
    return tuple(found)


def _weights(n: int, m: int, i: int, interpolation: Interpolation) -> tuple[int, list[float]]:
    """The first input of the filter window of output i of m, and the weights from there on."""
    scale = n / m
    stretch = max(scale, 1.0)
    support = _SUPPORT[interpolation] * stretch
    centre = (i + 0.5) * scale
    first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), n)
    weights = [_kernel((x + first - centre + 0.5) / stretch, interpolation) for x in range(last - first)]
    total = sum(weights) or 1.0
    return first, [int(w / total * 2**BITS + math.copysign(0.5, w)) / 2**BITS for w in weights]


def _kernel(x: float, interpolation: Interpolation) -> float:
    x, a = abs(x), -0.5
    if interpolation == "bilinear":
        return max(0.0, 1.0 - x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


@lru_cache(maxsize=4096)
def pass_order(height: int, width: int, to_height: int, to_width: int, interpolation: Interpolation) -> tuple[int, int]:
    """Order of Pillow's two passes: -1 filters along rows, -2 along columns.

    Pillow up to 12 filters rows first, Pillow 13 columns first where that is faster. The order is detected: noise is
    resized with the installed Pillow until the two orders give different bytes."""
    rows_first = (-1, -2)
    if height in (1, to_height) or width in (1, to_width):  # one pass is skipped, or copies pixels
        return rows_first
    across = bands(width, to_width, 0, min(to_width, BAND), interpolation)
    down = bands(height, to_height, 0, min(to_height, BAND), interpolation)
    random = np.random.default_rng(0)
    for attempt in range(PROBES):
        noise = random.integers(0, 256, (height, width), dtype=np.uint8)
        if attempt % 2:
            noise = (noise > 127) * np.uint8(255)
        expected = np.asarray(Image.fromarray(noise).resize((to_width, to_height), _PILLOW[interpolation]))
        expected, x = expected[:BAND, :BAND], torch.from_numpy(noise)
        same = [
            np.array_equal(_filter(_filter(x, first, a), then, b), expected)
            for first, a, then, b in ((across, -1, down, -2), (down, -2, across, -1))
        ]
        if same[0] != same[1]:
            return rows_first if same[0] else rows_first[::-1]
        if not same[0]:
            raise RuntimeError(
                f"Pillow {PILLOW} resizes {width} x {height} to {to_width} x {to_height} in an unknown way; use "
                "method 'antialias', and report it"
            )
    return rows_first
