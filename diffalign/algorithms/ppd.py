"""PPD: Personalized Preference fine-tuning of Diffusion models (Dang et al., 2025, arXiv 2501.06655).

    margin = beta/2 (gain_w - gain_l);  gain = err(reference(x_t, t, c)) - err(policy(x_t, t, c, u))
    loss = -log sigmoid(margin), u the embedding of who chose;  for nobody: null_weight |policy(0) - reference|^2

The policy hears the user through decoupled cross-attention, the reference is the same network without.

Differs from the paper:
- Stable Cascade there, Stable Diffusion and SDXL here, whose adapters stock diffusers loads.
- A user is embedded from a few of their choices by a personal scorer or a vision-language model; the pair that is
  trained on may be among them only where a person has too few.
- A dropped user (the paper zeroes embeddings as a regulariser) is not trained on somebody's pair, which would move
  nobody's images to the average taste, but held at the reference.
- A share of the pairs is told a mixture of two users, and whose pair it is decides the mixture's larger part, so that
  mixing users moves images from one taste to the other (ours).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.algorithms.diffusion_dpo import DiffusionDPO
from diffalign.draws import Draws
from diffalign.losses import denoising_error
from diffalign.noising import Noising
from diffalign.sampling import Network
from diffalign.types import LatentBatch, Metrics


class PPD(DiffusionDPO):
    """Diffusion-DPO conditioned on the user.

    Positional: as DiffusionDPO's, then who chose each pair (sample id -> user), every user's embeddings [M, T, D] from
    different choices of theirs, and the draws of the run.

    Args:
        beta: as in Diffusion-DPO; raise it when prompts are followed less
        user_dropout: share of the pairs that hold nobody at the reference instead of training a user
        user_mixing: share of the pairs told a mixture with another user
        null_weight: weight of the squared distance of nobody's answer to the reference's
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
        user_dropout: float = 0.1,
        user_mixing: float = 0.1,
        null_weight: float = 100.0,
    ):
        super().__init__(policy, reference, noising, dims, beta=beta)
        self.base, self.users_of, self.users, self.draws = reference, users_of, users, draws
        self.names = sorted(users)
        self.user_dropout, self.user_mixing, self.null_weight = user_dropout, user_mixing, null_weight

    @staticmethod
    def check(cfg: dict[str, Any], data: dict[str, Any]) -> list[str]:
        """What cannot work in an `algorithm` section, one line each."""
        problems = []
        if not cfg["beta"] > 0:
            problems.append(f"'algorithm.beta' = {cfg['beta']} must be positive; 500 to 20000 is usual")
        shares = ("user_dropout", "user_mixing")
        problems += [f"'algorithm.{k}' = {cfg[k]} must lie in [0, 1)" for k in shares if not 0 <= cfg[k] < 1]
        if cfg["null_weight"] < 0:
            problems.append(f"'algorithm.null_weight' = {cfg['null_weight']} must be 0 or more")
        return problems

    def batches(self, loader: Iterator[LatentBatch]) -> Iterator[LatentBatch]:
        """The loader's pairs, each with the embedding of who chose: cond.user [B, T, D], zero for nobody."""
        for batch in loader:
            user = torch.stack([self._draw(key) for key in batch.keys]).to(batch.x0.device)
            yield batch._replace(cond=batch.cond._replace(user=user))

    def _draw(self, key: Any) -> Tensor:
        """What a pair is told of its user [T, D], by its key."""
        mine = self._embedding(self.users_of[key[1]], key)
        chance = self.draws.uniform([key], stream="user dropout").item()
        if chance < self.user_dropout:
            return torch.zeros_like(mine)
        if chance < self.user_dropout + self.user_mixing:
            other = self.names[int(self.draws.integers([key], 0, len(self.names), stream="mixed user"))]
            share = 0.5 + 0.5 * self.draws.uniform([key], stream="mixture").item()
            return share * mine + (1 - share) * self._embedding(other, key)
        return mine

    def _embedding(self, user: str, key: Any) -> Tensor:
        table = self.users[user]
        return table[int(self.draws.integers([(key, user)], 0, len(table), stream="support"))]

    def loss(self, batch: LatentBatch) -> tuple[Tensor, Metrics]:
        """B pairs with users -> mean loss, and Diffusion-DPO's metrics of those with a user, and nobody's distance."""
        user = batch.cond.user
        assert user is not None
        nobody = (user == 0).flatten(1).all(1)
        total, metrics = super().loss(batch._replace(weight=batch.weight * ~nobody))
        metrics = {
            k: torch.where(nobody, torch.nan, v) if v.shape == nobody.shape and k != "loss" else v
            for k, v in metrics.items()
        }
        drift = torch.full_like(batch.weight, torch.nan)
        if nobody.any():
            noised = self.noised(batch)
            rows = nobody[batch.group].nonzero()[:, 0]
            x_t, t, cond = noised.input
            inputs = (x_t[rows], t[rows], cond.at(rows))
            with torch.no_grad():
                target = self.base(*inputs)
            apart = denoising_error(self.policy(*inputs), target)
            total = total + self.null_weight * apart.sum() / len(rows) * nobody.float().mean()
            drift[batch.group[rows]] = apart.detach()
        return total, {**metrics, "null_distance": drift}
