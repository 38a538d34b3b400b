"""MaPO (Hong et al., 2024, arXiv 2406.06424): preference without a reference model.

    loss = err_w - weight log sigmoid(sharpness (f(err_w) - f(err_l)));  f(x) = (scale x / (exp(scale x) - 1))^power

f falls from 1 at error 0, so the margin grows where the winner's error falls below the loser's. Errors are means over
C, h, w; winner and loser share t and eps.

Paper (AAAI version) and released code have different links, both are settings of this one:
    released code   scale 0.5, power 1, sharpness 1000, weight 0.1
    paper           scale 1, power beta, sharpness 1, weight 1/beta (beta 128 to 1024)
On flow models errors are near 1, not 0.1, where f is flatter: sharpness has to be tuned anew.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.algorithms.denoising import Denoising, check_reference_free
from diffalign.diffusion.noising import Noising, errors
from diffalign.types import LatentBatch, Metrics, Recent


def link(error: Tensor, scale: float, power: float) -> Tensor:
    """(scale error / (exp(scale error) - 1))^power, 1 at error 0."""
    x = (scale * error).clamp(min=1e-12)
    return (x / torch.expm1(x)) ** power


class MaPO(Denoising):
    """Raises the likelihood of winners and its margin over that of losers. One forward a pair, no reference.

    Positional: policy and noising.

    Args:
        scale: of the error inside the link function
        power: exponent of the link function
        sharpness: of the margin between winner and loser
        weight: of the margin's term beside the winner's error
    """

    def __init__(
        self,
        policy: nn.Module,
        noising: Noising,
        *,
        scale: float = 0.5,
        power: float = 1.0,
        sharpness: float = 1000.0,
        weight: float = 0.1,
    ):
        super().__init__(policy, None, noising)
        self.scale, self.power, self.sharpness, self.weight = scale, power, sharpness, weight

    @staticmethod
    def check(cfg: dict[str, Any], data: dict[str, Any]) -> list[str]:
        """What cannot work in an `algorithm` section with this `data` section, one line each."""
        problems = [f"'algorithm.{k}' = {v} must be positive" for k, v in cfg.items() if not v > 0]
        return problems + check_reference_free(data)

    def loss(self, batch: LatentBatch) -> tuple[Tensor, Metrics]:
        """B pairs -> mean loss, and per pair [B]: accuracy, margin, errors, each also by noise level."""
        noised = self.noised(batch)
        err_w, err_l = errors(self.policy, noised).chunk(2)
        margin = self.sharpness * (link(err_w, self.scale, self.power) - link(err_l, self.scale, self.power))
        losses = err_w - self.weight * F.logsigmoid(margin)
        metrics = {
            "loss": losses.detach(),
            "accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),
            "margin": margin.detach(),
            "winner_error": err_w.detach(),
            "loser_error": err_l.detach(),
        }
        return losses.mean(), metrics | self.by_level(metrics, noised)

    def verdict(self, recent: Recent) -> str:
        share = recent.share("policy/accuracy")
        said = "unknown" if share is None else f"{share[0]:.0%} +- {2 * share[1]:.0%}"
        return (
            f"verdict: the winner has the smaller error in {said} of the last {recent.samples} pairs; there is no "
            "reference to measure drift against: judge its images with eval/win_rate.py"
        )
