"""DRaFT-K (Clark et al., 2023, arXiv 2309.17400): back-propagate rewards through the last K steps of the sampler.

    loss = -r(x0(z, c), c) + reference_weight mean over the K steps of (policy - reference)^2

AlignProp (Prabhudesai et al., 2023) is the same with eta 1 and a random K. Earlier steps run without gradients. The
rewards' gradient with respect to x0 is computed first, so their graph is freed before the backward pass of the sampler.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffalign.algorithms.base import check_inner_gradients
from diffalign.algorithms.reward_gradient import RewardGradient, check_anchors
from diffalign.networks.reference import AdapterOffReference, FrozenReference
from diffalign.networks.sampler import Sampler, Transition
from diffalign.objectives.rewards import Rewards
from diffalign.types import PromptBatch


class DRaFT(RewardGradient):
    """DRaFT-K: reward gradients through the last K sampling steps.

    Positional: the policy, the frozen reference, the sampler and the rewards.

    Args:
        last_steps: K, the number of steps with gradients; all steps of the sampler for DRaFT without K
        reference_weight: weight of the squared difference between policy and reference, proportional to the KL of
            their transitions
        start_weight: weight of the squared distance of the weights from their initial values
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: FrozenReference | AdapterOffReference,
        sampler: Sampler,
        rewards: Rewards,
        *,
        last_steps: int = 1,
        reference_weight: float = 0.0,
        start_weight: float = 0.0,
    ):
        super().__init__(
            policy, reference, sampler, rewards, reference_weight=reference_weight, start_weight=start_weight
        )
        self.graded = range(len(sampler) - last_steps, len(sampler))

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
        if not 1 <= cfg["last_steps"] <= count:
            problems.append(
                f"'algorithm.last_steps' = {cfg['last_steps']} must be in [1, {count}], the sampler's steps"
            )
        return problems

    def transitions(self, batch: PromptBatch) -> tuple[list[Transition], Tensor]:
        transitions = self.sampler.walk(self.policy, batch.cond, batch.keys, graded=self.graded)
        return [transitions[k] for k in self.graded], transitions[-1].x_next
