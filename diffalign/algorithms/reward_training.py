"""Reward model training on human preferences with the Bradley-Terry loss (Bradley & Terry, 1952).

    loss = mean over pairs of -(1 - e) log sigmoid(s_w - s_l) - e log sigmoid(s_l - s_w)

s is the scorer's logit, e the label noise. HPSv2 (Wu et al., 2023) fine-tunes CLIP with this loss; ImageReward (Xu et
al., 2023) and VP-Score (Wu et al., 2024) fine-tune BLIP.

Differences from the released code:
- HPSv2 sums over the batch (`reduction: sum`). With AdamW and no clipping this only matters relative to Adam's eps.
- HPSv2's list-wise hinge counts the diagonal and the padding as pairs. Here every ordered pair of a group counts once.
  The loss is averaged over pairs, then over groups, so a prompt with 9 images has the weight of one with 2.
- Several aspects are columns of scores, each with its own ranking. The loss is the mean over aspects.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffalign.algorithms.base import Algorithm, Turn
from diffalign.draws import Draws, seeded
from diffalign.objectives.preference import plackett_luce, ranking
from diffalign.types import GroupBatch, Metrics, RecentMetrics


class RewardTraining(Algorithm):
    """Bradley-Terry training on groups of images. The player `scorer` maps (pixels, prompts) to logits [N] or [N, A].

    Positional: the scorer as prepared by accelerate, the draws of the run, the names of the A aspects.

    Args:
        reduction: mean over the prompts of a batch, or sum as in HPSv2's released code
        loss: pairs, the mean over the pairs of a group; list, Plackett-Luce: the best image is chosen among all, the
            second best among the others, and so on. Equal for two images
        label_smoothing: probability in [0, 0.5) that a label is wrong, for records without a value of their own
        dropout: whether dropout layers are active; masks are seeded by key, so that a resumed run repeats them
    """

    def __init__(
        self,
        scorer: nn.Module,
        draws: Draws,
        aspects: tuple[str, ...] = ("overall",),
        *,
        reduction: Literal["mean", "sum"] = "mean",
        loss: Literal["pairs", "list"] = "pairs",
        label_smoothing: float = 0.0,
        dropout: bool = False,
    ):
        self.players = {"scorer": scorer}
        self.scorer, self.draws, self.aspects = scorer, draws, aspects
        self.objective = ranking if loss == "pairs" else plackett_luce
        self.reduction, self.label_smoothing, self.dropout = reduction, label_smoothing, dropout
        self.shown = ("scorer/loss", *(f"scorer/accuracy/{name}" for name in aspects))

    def turns(self, step: int) -> tuple[Turn, ...]:
        return (Turn("scorer", self.loss),)

    def loss(self, batch: GroupBatch) -> tuple[Tensor, Metrics]:
        """Groups -> mean or summed loss, and the accuracy [G] of each aspect."""
        logits = self._logits(batch)
        flip = torch.where(batch.flip > 0, batch.flip, self.label_smoothing)
        losses, right, pairs = self.objective(logits, batch.ranks, batch.group, flip)
        rated = pairs > 0
        each = losses.sum(1) / rated.sum(1).clamp(min=1)
        accuracy = torch.where(rated, right.detach(), torch.nan)
        metrics = {f"accuracy/{name}": accuracy[:, k] for k, name in enumerate(self.aspects)}
        metrics["logit_std"] = logits.detach().std()
        return (each.sum() if self.reduction == "sum" else each.mean()), metrics

    def _logits(self, batch: GroupBatch) -> Tensor:
        """Logits [N, A] in float32; dropout masks are pure functions of the keys."""
        self.scorer.train(self.dropout)
        seed = int(self.draws.integers([tuple(batch.keys)], 0, 2**62, stream="dropout")) if self.dropout else 0
        with seeded(seed, batch.pixels.device) if self.dropout else nullcontext():
            return self.scorer(batch.pixels, batch.prompts).float().reshape(len(batch.pixels), -1)

    def verdict(self, recent: RecentMetrics) -> str:
        found = {name: recent.proportion(f"scorer/accuracy/{name}") for name in self.aspects}
        rates = [f"{name} {x[0]:.1%} +- {2 * x[1]:.1%}" if x else f"{name} unknown" for name, x in found.items()]
        return f"accuracy on the last {recent.samples} training groups: {', '.join(rates)}"

    @staticmethod
    def check(cfg: dict[str, Any]) -> list[str]:
        """Problems with an `algorithm` section, one line each."""
        e = cfg["label_smoothing"]
        return [] if 0 <= e < 0.5 else [f"'algorithm.label_smoothing' = {e} must lie in [0, 0.5)"]
