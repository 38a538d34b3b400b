"""DDPO (Black et al., 2023, arXiv 2305.13301): policy gradient on the steps of a diffusion sampler, and DPOK's options.

    loss = mean of max(-A rho, -A clip(rho, 1 - clip, 1 + clip)),  rho = p_now(x_next | x_t) / p_rollout(x_next | x_t)

The sampler's guidance is part of the policy: gradients pass through both branches. For Stable Diffusion use
`sampler.law=ancestral` (DDIM with eta 1); few-step students use the steps with which they are sampled.
`rollouts.spread=prompt` are the released code's advantages, against the last rewards of the prompt. DPOK (Fan et al.,
2023, 2305.16381) adds the KL to the initial model, `kl_weight`, and clips without the maximum, `clipping=hard`.

Difference from the released code: all steps but the last are trained.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from diffalign.algorithms.policy_gradient import Move, PolicyGradient
from diffalign.algorithms.rollouts import Rollouts
from diffalign.diffusion.steps import Network
from diffalign.objectives.policy_gradient import clipped_policy_loss, hard_clipped_policy_loss


class DDPO(PolicyGradient):
    """DDPO: raises the likelihood of images with more reward than others of the same prompt.

    Args:
        clip: half width of the range of ratios around 1 (1e-4 as released)
        clipping: ppo, or hard as DPOK's code
        kl_weight: weight of the KL to the initial model, per transition
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: Network,
        rollouts: Rollouts,
        *,
        clip: float = 1e-4,
        clipping: Literal["ppo", "hard"] = "ppo",
        kl_weight: float = 0.0,
    ):
        super().__init__(policy, reference, rollouts, clip=clip, kl_weight=kl_weight)
        self.objective = clipped_policy_loss if clipping == "ppo" else hard_clipped_policy_loss

    def policy_loss(self, move: Move, log_p: Tensor, log_p_old: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return self.objective(log_p, log_p_old, move.images.advantage, self.clip)
