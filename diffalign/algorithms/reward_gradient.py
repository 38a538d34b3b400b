"""Base class of ReFL, DRaFT and R0: samples with gradients, reward gradients, and regularisers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.algorithms.base import Algorithm
from diffalign.diffusion.noising import denoising_error
from diffalign.networks.reference import AdapterOffReference, DistanceToStart, FrozenReference
from diffalign.networks.sampler import Sampler, Transition
from diffalign.objectives.rewards import RewardDirection, Rewards, reward_loss
from diffalign.types import Metrics, PromptBatch, RecentMetrics


class RewardGradient(Algorithm):
    """Maximises rewards by back-propagation through the scorers, the decoder and the sampler.

    Positional: the policy, the frozen reference, the sampler and the rewards.
    """

    inner_gradients = True
    shown = ("policy/loss", "policy/reward")

    def __init__(
        self,
        policy: nn.Module,
        reference: FrozenReference | AdapterOffReference,
        sampler: Sampler,
        rewards: Rewards,
        *,
        reference_weight: float,
        start_weight: float,
    ):
        rewards.require_gradient(type(self).__name__)
        self.players = {"policy": policy}
        self.policy, self.reference, self.sampler, self.rewards = policy, reference, sampler, rewards
        self.reference_weight, self.start_weight = reference_weight, start_weight
        self.distance = DistanceToStart(policy) if start_weight else None

    @abstractmethod
    def transitions(self, batch: PromptBatch) -> tuple[list[Transition], Tensor]:
        """The transitions of B samples that run with gradients, and the x0 [B, C, h, w] to reward."""

    def ascend(self, x0: Tensor, batch: PromptBatch) -> RewardDirection:
        """Rewards of x0 [B, C, h, w] and their gradient."""
        return self.rewards.ascend(x0, batch.prompts)

    def loss(self, batch: PromptBatch) -> tuple[Tensor, Metrics]:
        """B prompts -> loss (negative reward plus regularisers), and metrics [B]: rewards and gradient norms."""
        transitions, x0 = self.transitions(batch)
        found = self.ascend(x0, batch)
        loss, metrics = reward_loss(x0, found).mean(), dict(found.metrics)
        if self.reference_weight:
            drift = torch.stack([self._drift(transition, batch) for transition in transitions]).mean(0)
            loss, metrics["reference_error"] = loss + self.reference_weight * drift.mean(), drift.detach()
        if self.distance is not None:
            distance = self.distance()
            loss, metrics["start_distance"] = loss + self.start_weight * distance, distance.detach()
        return loss, metrics

    def _drift(self, transition: Transition, batch: PromptBatch) -> Tensor:
        """Mean squared difference [B] between the predictions of policy and reference at one transition."""
        with torch.no_grad():
            reference_out = self.sampler.predict(self.reference, transition.x_t.detach(), transition.t, batch.cond)
        return denoising_error(transition.out, reference_out)

    def state(self) -> dict[str, Tensor]:
        return self.rewards.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.rewards.load(state)

    def verdict(self, recent: RecentMetrics) -> str:
        return (
            f"verdict: reward {recent.formatted('policy/reward')} over the last {recent.samples} samples, "
            f"{recent.formatted('policy/clamped', '.1%')} of the "
            "pixels clamped (over 5 % above the start is over-saturation); judge its images with another scorer than "
            "this one: `diffalign eval win_rate`"
        )


def check_anchors(cfg: dict[str, Any]) -> list[str]:
    """Problems with the regularisation weights of an `algorithm` section, one line each."""
    names = ("reference_weight", "start_weight")
    return [f"'algorithm.{k}' = {cfg[k]} must be 0 or more" for k in names if cfg[k] < 0]
