"""DDPO (Black et al., 2023, arXiv 2305.13301): policy gradient on the steps of a diffusion sampler, and DPOK's options.

    loss = mean of max(-A rho, -A clip(rho, 1 - clip, 1 + clip)),  rho = p_now(x_next | x_t) / p_rollout(x_next | x_t)

The sampler's guidance is part of the policy: gradients pass through both branches. For Stable Diffusion use
`sampler.law=ancestral` (DDIM with eta 1); few-step students use the steps with which they are sampled. DPOK (Fan et
al., 2023, 2305.16381) adds the KL to the initial model, `kl_weight`, and clips without the maximum, `clipping=hard`.

Differences from the released code: advantages are normalised in groups of images of the same prompt, drawn in the same
rollout, instead of a buffer of the prompt's last rewards; all steps but the last are trained.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from diffalign.algorithms.policy_gradient import Moves, PolicyGradient
from diffalign.diffusion.steps import Network
from diffalign.networks.sampler import Sampler
from diffalign.objectives.policy_gradient import clipped_policy_loss, hard_clipped_policy_loss
from diffalign.objectives.rewards import Rewards


class DDPO(PolicyGradient):
    """DDPO: raises the likelihood of images with more reward than others of the same prompt.

    Args:
        group_size: images per prompt and rollout
        clip: half width of the range of ratios around 1 (1e-4 as released)
        clipping: ppo, or hard as DPOK's code
        spread: standard deviation that divides advantages: of the group, or of all samples of the micro-batch
        kl_weight: weight of the KL to the initial model, per transition
        updates: optimizer steps per rollout
        chunk: samples in a forward pass with gradients; all of a micro-batch when left out
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: Network,
        sampler: Sampler,
        rewards: Rewards,
        micro_batches: int,
        *,
        group_size: int = 8,
        clip: float = 1e-4,
        clipping: Literal["ppo", "hard"] = "ppo",
        spread: Literal["group", "batch"] = "group",
        kl_weight: float = 0.0,
        updates: int = 1,
        chunk: int | None = None,
    ):
        options: Any = {"group_size": group_size, "spread": spread, "kl_weight": kl_weight}
        super().__init__(policy, reference, sampler, rewards, micro_batches, updates=updates, chunk=chunk, **options)
        self.clip, self.objective = clip, clipped_policy_loss if clipping == "ppo" else hard_clipped_policy_loss

    @staticmethod
    def check(cfg: dict[str, Any]) -> list[str]:
        """Problems with an `algorithm` section, one line each."""
        clip = [] if 0 < cfg["clip"] < 1 else [f"'algorithm.clip' = {cfg['clip']} must lie between 0 and 1"]
        return clip + PolicyGradient.check(cfg)

    def policy_loss(self, moves: Moves, log_p: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return self.objective(log_p, moves.log_p, moves.advantage, self.clip)
