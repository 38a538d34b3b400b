"""Supervised fine-tuning on the winners, the baseline of preference methods.

loss = err_w = mean over C, h, w of (network(x_t, t, c) - target)^2
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffalign.algorithms.denoising import Denoising, check_reference_free
from diffalign.diffusion.noising import Noising, errors
from diffalign.types import LatentBatch, Metrics, RecentMetrics


class SFT(Denoising):
    """Standard diffusion training on the winners of preference pairs; losers are ignored.

    Positional: policy and noising.
    """

    shown = ("policy/loss", "policy/winner_error")

    def __init__(self, policy: nn.Module, noising: Noising):
        super().__init__(policy, None, noising)

    @staticmethod
    def check(cfg: dict[str, Any], data: dict[str, Any]) -> list[str]:
        """Problems with this `data` section, one line each; the method has no settings of its own."""
        return check_reference_free(data)

    def loss(self, batch: LatentBatch) -> tuple[Tensor, Metrics]:
        """B pairs -> mean loss, and the winner's error [B], also by noise level."""
        count = len(batch.keys)
        size = None if batch.size is None else batch.size[:count]
        winners = batch._replace(x0=batch.x0[:count], group=batch.group[:count], scores=batch.scores[:count], size=size)
        noised = self.noised(winners)
        error = errors(self.policy, noised)
        metrics = {"winner_error": error.detach()}
        return error.mean(), metrics | self.by_level(metrics, noised)

    def verdict(self, recent: RecentMetrics) -> str:
        error = recent.formatted("policy/winner_error", ".4f")
        return f"verdict: winner error {error}; judge its images with `diffalign eval win_rate`"
