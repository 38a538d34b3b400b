"""Differences of tensor resizes from Pillow's, in grey levels (0 to 255), and their time on one core.

    python benchmarks/resize_gap.py

Images with the spectrum of photographs (1/f noise) and with hard edges are resized to 224 pixels. Prints the table of
docs/preprocessing.md.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from reward_models.preprocess import Method, resize

METHODS: tuple[Method, ...] = ("pil", "antialias", "plain")


def photograph(side: int) -> Tensor:
    """Image [1, 3, side, side] of 8-bit values over 255, with amplitudes 1/f as in photographs."""
    frequency = torch.fft.fftfreq(side).square()
    amplitude = 1 / (frequency[:, None] + frequency[None] + 1e-6).sqrt()
    g = torch.Generator().manual_seed(0)
    x = torch.fft.ifft2(torch.fft.fft2(torch.randn(1, 3, side, side, generator=g)) * amplitude).real
    x = (x - x.mean()) / x.std() * 0.2 + 0.5
    return (x.clamp(0, 1) * 255).round() / 255


def edges(side: int) -> Tensor:
    """Image [1, 3, side, side]: a black and white checkerboard of 7-pixel squares."""
    stripe = (torch.arange(side) // 7) % 2
    return (stripe[:, None] ^ stripe[None]).float().expand(1, 3, -1, -1)


def main() -> None:
    torch.set_num_threads(1)
    print("| image | method | mean gap | largest gap | equal bytes | ms an image |\n|---|---|---|---|---|---|")
    for name, x in (("photograph", photograph(512)), ("photograph", photograph(1024)), ("edges", edges(512))):
        exact = resize(x, (224, 224))
        for method in METHODS:
            seconds = []
            for _ in range(20):
                started = time.process_time()
                y = resize(x, (224, 224), method=method)
                seconds.append(time.process_time() - started)
            ms = 1000 * statistics.median(seconds)
            gap = ((y.clamp(0, 1) * 255).round() - exact * 255).abs()
            equal = (gap < 0.5).float().mean()
            cells = f"{gap.mean():.3f} | {gap.max():.0f} | {equal:.1%} | {ms:.0f}"
            print(f"| {name} {x.shape[-1]} | {method} | {cells} |")


if __name__ == "__main__":
    main()
