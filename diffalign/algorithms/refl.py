"""ReFL (Xu et al., 2023, arXiv 2304.05977): reward the x0 prediction at one late sampling step.

    loss = max(0, ceiling - r(x0_hat, c)) + reference_weight (policy - reference)^2

x0_hat is the x0 prediction at a random late step of the sampler. Only that step runs with gradients.

Differences from the released code: guidance is supported; the regulariser is the distance to the reference on the
model's own samples (paper: an additional pre-training loss on images); the reward has scale 1, since Adam is invariant
to it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffalign.algorithms.base import check_inner_gradients
from diffalign.algorithms.reward_gradient import RewardGradient, check_anchors
from diffalign.networks.reference import AdapterOffReference, FrozenReference
from diffalign.networks.sampler import Sampler, Transition
from diffalign.objectives.rewards import RewardDirection, Rewards
from diffalign.types import PromptBatch


class ReFL(RewardGradient):
    """ReFL: reward gradients through one random late sampling step.

    Positional: the policy, the frozen reference, the sampler and the rewards.

    Args:
        first_step: first sampling step that may be rewarded, counted from 0 (30 of 40 as released)
        ceiling: samples with a higher reward get no gradient; null for none (2 for ImageReward as released)
        reference_weight: weight of the squared difference between policy and reference
        start_weight: weight of the squared distance of the weights from their initial values
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: FrozenReference | AdapterOffReference,
        sampler: Sampler,
        rewards: Rewards,
        *,
        first_step: int,
        ceiling: float | None = None,
        reference_weight: float = 0.0,
        start_weight: float = 0.0,
    ):
        super().__init__(
            policy, reference, sampler, rewards, reference_weight=reference_weight, start_weight=start_weight
        )
        self.first_step, self.ceiling = first_step, ceiling

    @staticmethod
    def check(
        cfg: dict[str, Any],
        sampler: dict[str, Any],
        backbone: dict[str, Any],
        reward: dict[str, Any],
        run: dict[str, Any],
    ) -> list[str]:
        """Problems with an `algorithm` section given these other sections, one line each."""
        count = len(sampler["timesteps"]) or sampler["steps"]
        problems = check_anchors(cfg) + check_inner_gradients(backbone=backbone, reward=reward, run=run)
        if not 0 <= cfg["first_step"] < count:
            problems.append(f"'algorithm.first_step' = {cfg['first_step']} must be in [0, {count - 1}]")
        return problems

    def transitions(self, batch: PromptBatch) -> tuple[list[Transition], Tensor]:
        stop = self.sampler.random_step(batch.keys, self.first_step)
        transition = self.sampler.walk(self.policy, batch.cond, batch.keys, stop=stop, graded=(stop,))[-1]
        return [transition], transition.x0

    def ascend(self, x0: Tensor, batch: PromptBatch) -> RewardDirection:
        return self.rewards.ascend(x0, batch.prompts, ceiling=self.ceiling)
