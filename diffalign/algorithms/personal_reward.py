"""Training a personal scorer on choices of many persons.

    loss = mean over choices of -log sigmoid(r(z_w, u) - r(z_l, u)) + beta_kl cost(u)

u is what the head makes of the person: a row of a table (PAL: Chen et al., 2024), a draw from what an encoder thinks of
some other choices of theirs (VPL: Poddar et al., 2024, with its divergence from the prior as the cost), the group that
explains those best (hard EM as in MaxMin-RLHF: Chakraborty et al., 2024), or nothing.

Differs from the released codes: see reward_models/personal/tastes.py; the number of other choices varies, so that a
head learns what few and what many are worth.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.algorithms.base import Algorithm, Turn
from diffalign.draws import Draws
from diffalign.types import ChoiceBatch, Metrics, Recent


class PersonalReward(Algorithm):
    """Bradley-Terry on choices, given the person. The player is `scorer`, a head of reward_models.personal.tastes.

    Positional: the head as prepared by accelerate, the width of a person's vector, the draws of the run.

    Args:
        beta_kl: weight of the cost of a person's vector; 1 / (choices of a person) is the evidence bound of VPL
    """

    shown = ("scorer/loss", "scorer/accuracy")

    def __init__(self, head: nn.Module, size: int, draws: Draws, *, beta_kl: float = 0.01):
        self.players = {"scorer": head}
        self.head, self.size, self.draws, self.beta_kl = head, size, draws, beta_kl

    def turns(self, step: int) -> tuple[Turn, ...]:
        return (Turn("scorer", self.loss),)

    def loss(self, batch: ChoiceBatch) -> tuple[Tensor, Metrics]:
        """Choices -> (scalar, accuracy, margin and cost of each)."""
        eps = self.draws.normal(batch.keys, (self.size,), stream="taste").to(batch.z_w.device)
        margin, cost = self.head(*batch[:6], eps)
        losses = F.softplus(-margin) + self.beta_kl * cost
        metrics = {"accuracy": (margin > 0).float(), "margin": margin.detach(), "cost": cost.detach()}
        return losses.mean(), metrics

    def verdict(self, recent: Recent) -> str:
        found = recent.share("scorer/accuracy")
        rate = "unknown" if found is None else f"{found[0]:.1%} +- {2 * found[1]:.1%}"
        return f"accuracy on the last {recent.samples} training choices: {rate}"

    @staticmethod
    def check(cfg: dict[str, Any]) -> list[str]:
        """What cannot work in an `algorithm` section."""
        return [] if cfg["beta_kl"] >= 0 else [f"'algorithm.beta_kl' = {cfg['beta_kl']} must be 0 or more"]
