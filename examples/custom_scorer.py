"""A scorer of your own: how colourful an image is (Hasler & Suesstrunk, 2003).

    PYTHONPATH=examples reward-score photos --prompt "" --scorer custom_scorer:Colourfulness --out scores.csv
    PYTHONPATH=examples diffalign train refl --config playground reward.scorers=[custom_scorer:Colourfulness]

A scorer is any class with `differentiable`, `unit` and `score`. Its keyword-only parameters are settings:
`custom_scorer:Colourfulness,mean_weight=0.5`. One with a network is an `nn.Module`, which is moved to the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Colourfulness:
    """sqrt(var rg + var yb) + mean_weight * sqrt(mean(rg)^2 + mean(yb)^2), rg = R - G, yb = (R + G) / 2 - B."""

    differentiable = True
    unit = "colourfulness of values in [0, 1]"

    def __init__(self, *, mean_weight: float = 0.3):
        self.mean_weight = mean_weight

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B, 3, H, W] float in [0, 1] and B prompts, which are not looked at -> float32 [B], larger is better."""
        red, green, blue = images.float().flatten(2).unbind(1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue])  # [2, B, H * W]
        spread = opponents.var(-1, correction=0).sum(0)
        mean = opponents.mean(-1).square().sum(0)
        return _root(spread) + self.mean_weight * _root(mean)


def _root(x: Tensor) -> Tensor:
    """The square root, with gradient 0 instead of infinity at 0: grey images have no colour at all."""
    return x.clamp(min=1e-12).sqrt()
