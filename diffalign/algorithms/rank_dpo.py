"""RankDPO (Karthik et al., 2024, arXiv 2410.18013): DPO over all pairs of a ranked group, weighted as DCG counts them.

    loss = sum over i ranked above j of Delta_ij * -log sigmoid(beta/2 (gain_i - gain_j))
    Delta_ij = |2^phi_i - 2^phi_j| * |1/ln(1 + rank_i) - 1/ln(1 + rank_j)|

phi is an image's win rate over the others of its prompt (Syn-Pic: under several scorers), gain as in Diffusion-DPO.
Every image is noised with its own eps at the group's timestep, as the paper's Algorithm 2 writes it.

No code was released. The text at hand lost its fraction bars: the reciprocals are those of the LambdaLoss that the
paper builds on. Its figure ranks by the model's own gains, its algorithm by phi: `rank_source`, phi by default.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.algorithms.denoising import Denoising, verdict
from diffalign.diffusion.noising import Noising, errors
from diffalign.diffusion.steps import Network
from diffalign.objectives.preference import describe_beta, gain
from diffalign.types import LatentBatch, Metrics, Recent


class RankDPO(Denoising):
    """Makes the order of the policy's implicit rewards that of a group's win rates.

    Positional: policy, reference, noising, and the number of values in a latent.

    Args:
        beta: strength of the pull to the reference, in the unit of Diffusion-DPO
        rank_source: ranks of the weights: the win rates, or the model's own gains at this step
        shared_noise: one eps for all images of a group, as Diffusion-DPO has it for a pair
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: Network,
        noising: Noising,
        dims: int,
        *,
        beta: float = 5000.0,
        rank_source: Literal["phi", "model"] = "phi",
        shared_noise: bool = False,
    ):
        super().__init__(policy, reference, noising)
        self.beta, self.dims, self.rank_source, self.shares_noise = beta, dims, rank_source, shared_noise

    @staticmethod
    def check(cfg: dict[str, Any]) -> list[str]:
        """What cannot work in an `algorithm` section."""
        return [] if cfg["beta"] > 0 else [f"'algorithm.beta' = {cfg['beta']} must be positive; 500 to 5000 is usual"]

    def loss(self, batch: LatentBatch) -> tuple[Tensor, Metrics]:
        """G groups -> mean loss, and per group [G]: accuracy over its pairs, error changes, by noise level."""
        noised = self.noised(batch)
        ref, err = self.reference_errors(batch, noised), errors(self.policy, noised)
        rewards = self.beta / 2 * gain(ref, err)
        weight = dcg_weights(batch.scores, rewards.detach() if self.rank_source == "model" else None, batch.group)
        pair = (weight > 0).float()
        margin = rewards[:, None] - rewards
        size = len(batch.keys)
        losses = _sums((-weight * F.logsigmoid(margin)).sum(1), batch.group, size)
        ranked = _sums(pair.sum(1), batch.group, size)
        right = _sums((pair * ((margin > 0).float() + 0.5 * (margin == 0).float())).sum(1), batch.group, size)
        best = _best(batch)
        metrics = {
            "loss": losses.detach(),
            "accuracy": right / ranked,  # NaN where all images of a group tie
            "winner_error_change": (err - ref).detach()[best],
            "reference_error": ref[best],
        }
        return losses.mean(), metrics | self.by_level(metrics, noised)

    def describe(self) -> list[str]:
        return describe_beta(self.beta, self.dims, f"ranks from {self.rank_source}")

    def verdict(self, recent: Recent) -> str:
        return verdict(recent)


def dcg_weights(phi: Tensor, order: Tensor | None, group: Tensor) -> Tensor:
    """The weight Delta_ij of every pair of one group with phi_i > phi_j, and 0 elsewhere: [N, N].

    phi [N], larger is better; order [N] ranks the images (phi does when None), ties by position; group int64 [N].
    Images that tie in phi have no gain over each other and make no pair. A matrix, since a list of the pairs would make
    the host wait for their number.
    """
    discount = 1 / torch.log1p(_ranks(phi if order is None else order, group))
    weight = (2 ** phi[:, None] - 2**phi) * (discount[:, None] - discount).abs()
    return torch.where((group[:, None] == group) & (phi[:, None] > phi), weight, 0.0)


def _ranks(values: Tensor, group: Tensor) -> Tensor:
    """1 for the largest value of each group, 2 for the next; of equal ones the first."""
    place = torch.arange(len(values), device=values.device)
    above = (values[None] > values[:, None]) | ((values[None] == values[:, None]) & (place[None] < place[:, None]))
    return 1 + (above & (group[None] == group[:, None])).sum(1).float()


def _sums(values: Tensor, group: Tensor, size: int) -> Tensor:
    """Sums by group, [size]."""
    return torch.zeros(size, device=values.device).index_add(0, group, values)


def _best(batch: LatentBatch) -> Tensor:
    """Where the image with the highest win rate of each group lies, [G]."""
    groups = torch.arange(len(batch.keys), device=batch.group.device)
    first = (batch.group == groups[:, None]) & (_ranks(batch.scores, batch.group) == 1)
    return first.int().argmax(1)
