"""PPD: Personalized Preference fine-tuning of Diffusion models (Dang et al., 2025, arXiv 2501.06655).

    margin = beta/2 (gain_w - gain_l);  gain = err(reference(x_t, t, c)) - err(policy(x_t, t, c, u))
    loss = -log sigmoid(margin), u the embedding of who chose

The policy hears the user through decoupled cross-attention, the reference is the same network without.

Differs from the paper:
- Stable Cascade there, Stable Diffusion and SDXL here, whose adapters stock diffusers loads.
- A user is embedded from a few of their choices by a personal scorer or a vision-language model; the pair that is
  trained on may be among them only where a person has too few.
- No dropped users: the paper zeroes some embeddings, which trains nobody's images towards the average taste. Here the
  adapter makes the zero embedding the reference itself, by construction, so there is nothing to train.
- A share of the pairs is told a mixture of two users, s of one and 1 - s of the other, and a share of s of them are the
  one's pairs, so that mixing users moves images from one taste to the other (ours).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.algorithms.diffusion_dpo import DiffusionDPO
from diffalign.diffusion.noising import Noising
from diffalign.diffusion.steps import Network
from diffalign.draws import Draws
from diffalign.types import LatentBatch


class PPD(DiffusionDPO):
    """Diffusion-DPO conditioned on the user.

    Positional: as DiffusionDPO's, then who chose each pair (sample id -> user), every user's embeddings [M, T, D] from
    different choices of theirs, and the draws of the run.

    Args:
        beta: as in Diffusion-DPO; raise it when prompts are followed less
        user_mixing: share of the pairs told a mixture with another user
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: Network,
        noising: Noising,
        dims: int,
        users_of: Mapping[str, str],
        users: Mapping[str, Tensor],
        draws: Draws,
        *,
        beta: float = 5000.0,
        user_mixing: float = 0.1,
    ):
        super().__init__(policy, reference, noising, dims, beta=beta)
        self.users_of, self.users, self.draws, self.user_mixing = users_of, users, draws, user_mixing
        self.names = sorted(users)

    @staticmethod
    def check(cfg: dict[str, Any], data: dict[str, Any]) -> list[str]:
        """What cannot work in an `algorithm` section, one line each."""
        problems = []
        if not cfg["beta"] > 0:
            problems.append(f"'algorithm.beta' = {cfg['beta']} must be positive; 500 to 20000 is usual")
        if not 0 <= cfg["user_mixing"] <= 1:
            problems.append(f"'algorithm.user_mixing' = {cfg['user_mixing']} must lie in [0, 1]")
        return problems

    def draw(self, batch: LatentBatch) -> LatentBatch:
        """Each pair also gets the embedding of who chose: cond.user [B, T, D]."""
        user = torch.stack([self._user(key) for key in batch.keys])
        return super().draw(batch._replace(cond=batch.cond._replace(user=user)))

    def _user(self, key: Any) -> Tensor:
        """What a pair is told of its user [T, D], by its key."""
        mine = self._embedding(self.users_of[key[1]], key)
        if self.draws.uniform([key], stream="user mixing").item() < self.user_mixing:
            other = self.names[int(self.draws.integers([key], 0, len(self.names), stream="mixed user"))]
            # Density 2s: of those who are told s of one and 1 - s of another, a share of s chose as the one does.
            share = self.draws.uniform([key], stream="mixture").item() ** 0.5
            return share * mine + (1 - share) * self._embedding(other, key)
        return mine

    def _embedding(self, user: str, key: Any) -> Tensor:
        table = self.users[user]
        return table[int(self.draws.integers([(key, user)], 0, len(table), stream="support"))]
