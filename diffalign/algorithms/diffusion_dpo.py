"""Diffusion-DPO (Wallace et al., 2023, arXiv 2311.12908) and every loss on its implicit-reward margin.

    gain = err(reference) - err(policy);  margin = beta/2 (gain_w - gain_l);  loss = -log sigmoid(margin)

with err = mean over C, h, w of (network(x_t, t, c) - target)^2, winner and loser sharing t and eps.

Differs from the paper: errors are means, not sums, and beta carries the factor 1/2, both as in the released code.
Differs from the released code:
- reference and policy errors are float32 (there the reference's are half precision: 0.3 logits an ulp at beta 5000);
- crop, flip and caption dropout are drawn once a pair (there the flip differs between winner and loser);
- latents are the mean of the VAE's posterior (there a sample of it);
- v-prediction works (there only eps); the weighting of timesteps is that of the network's own target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffalign.algorithms.base import Algorithm
from diffalign.draws import Draws
from diffalign.losses import PAIR_LOSSES, PairTerms, beta_in_other_units, check_pair_loss, denoising_error
from diffalign.schedule import VPSchedule
from diffalign.types import Cond, Key, Metrics, PairBatch

BUCKETS = 4
"""Metrics are logged for each quarter of the timesteps as well."""


class Noised(NamedTuple):
    """2B noised latents as a network takes them, (x_t, t, cond), and what it should answer."""

    input: tuple[Tensor, Tensor, Cond]
    target: Tensor


class DiffusionDPO(Algorithm):
    """Raises the policy's implicit reward of winners over losers, relative to a frozen reference.

    Args:
        beta: strength of the pull to the reference; mean-form error, factor 1/2 (5000 as released for SD1.5 and SDXL)
        loss: which function of the margin; see diffalign/losses.py
        label_smoothing: assumed share of wrong labels, where the loss uses one and a pair does not say its own
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: Callable[[Tensor, Tensor, Cond], Tensor],
        schedule: VPSchedule,
        draws: Draws,
        dims: int,
        *,
        beta: float = 5000.0,
        loss: str = "dpo",
        label_smoothing: float = 0.0,
    ):
        self.players = {"policy": policy}
        self.policy, self.schedule, self.draws = policy, schedule, draws
        self.reference: Callable[[Tensor, Tensor, Cond], Tensor] | None = reference
        self.beta, self.name, self.label_smoothing, self.dims = beta, loss, label_smoothing, dims
        self.pair_loss = PAIR_LOSSES[loss]
        self.known: dict[Key, tuple[float, float]] = {}

    @staticmethod
    def check(cfg: dict[str, Any], data: dict[str, Any]) -> list[str]:
        """What cannot work in an `algorithm` section with this `data` section, one line each."""
        problems = check_pair_loss(cfg["loss"], cfg["label_smoothing"], data["batch_size"])
        if not cfg["beta"] > 0:
            problems.append(f"'algorithm.beta' = {cfg['beta']} must be positive; 500 to 5000 is usual")
        return problems

    def remember_reference(self, batches: Iterable[PairBatch], gather: Callable[[list[Any]], list[Any]]) -> None:
        """Run the reference on every draw of every pair, once; afterwards it is not needed and is let go.

        batches  this rank's share of the draws
        gather   all ranks' lists -> one list
        """
        assert self.reference is not None
        found: list[tuple[Key, tuple[float, float]]] = []
        for batch in batches:
            noised = self._noised(batch)
            errors = denoising_error(self.reference(*noised.input), noised.target).view(2, -1).T.tolist()
            found += [(key, (w, l_)) for key, (w, l_) in zip(batch.keys, errors, strict=True)]
        self.known, self.reference = dict(gather(found)), None

    def _noised(self, batch: PairBatch) -> Noised:
        """Noise a pair's two images alike, with the timestep and noise of its key."""
        t = self.schedule.sample_timesteps(self.draws, batch.keys).to(batch.x0.device).repeat(2)
        eps = self.draws.normal(batch.keys, batch.x0.shape[1:], stream="noise").to(batch.x0.device).repeat(2, 1, 1, 1)
        x_t, target = self.schedule.add_noise(batch.x0, eps, t), self.schedule.target(batch.x0, eps, t)
        return Noised((x_t, t, batch.cond.repeat(2)), target)

    def loss(self, batch: PairBatch) -> tuple[Tensor, Metrics]:
        """B pairs -> mean loss, and per pair [B]: accuracy, margin, error changes, each also by timestep quarter."""
        noised = self._noised(batch)
        if self.reference is None:
            ref_w, ref_l = torch.tensor([self.known[k] for k in batch.keys], device=batch.x0.device).T
        else:
            ref_w, ref_l = denoising_error(self.reference(*noised.input), noised.target).chunk(2)
        err_w, err_l = denoising_error(self.policy(*noised.input), noised.target).chunk(2)
        flip = torch.where(batch.flip > 0, batch.flip, self.label_smoothing)
        terms = PairTerms(err_w, err_l, ref_w, ref_l, self.beta, flip)
        losses = batch.weight * self.pair_loss(terms)
        margin = terms.margin.detach()
        metrics = {
            "loss": losses.detach(),
            "accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),
            "margin": margin,
            "winner_error_change": (err_w - ref_w).detach(),
            "loser_error_change": (err_l - ref_l).detach(),
            "reference_error": ref_w,
        }
        return losses.mean(), metrics | self._by_timestep(metrics, noised.input[1].chunk(2)[0])

    def _by_timestep(self, metrics: Metrics, t: Tensor) -> dict[str, Tensor]:
        width = self.schedule.num_timesteps // BUCKETS
        quarter = (t // width).clamp(max=BUCKETS - 1)
        return {
            f"{name}@t{k * width:03d}": torch.where(quarter == k, values, torch.nan)
            for name, values in metrics.items()
            for k in range(BUCKETS)
        }

    def describe(self) -> list[str]:
        others = [f"  {value:g} {unit}" for unit, value in beta_in_other_units(self.beta, self.dims).items()]
        return [f"beta {self.beta:g} (mean-form error, factor 1/2), loss '{self.name}'; the same elsewhere:", *others]

    def verdict(self, recent: Mapping[str, float]) -> str:
        accuracy, winner = recent["policy/accuracy"], recent["policy/winner_error_change"]
        drift = winner / recent["policy/reference_error"]
        ranks = "ranks pairs as people did" if accuracy > 0.5 else "does not rank pairs as people did"
        if drift > 0.1:
            state = "the winners' own error rose by over 10 %, which destroys images: lower the lr or raise beta"
        else:
            state = "judge its images with eval/win_rate.py, for these numbers also rise on models being destroyed"
        return (
            f"verdict: implicit accuracy {accuracy:.2f} over the last steps, the policy {ranks}; "
            f"winner error {drift:+.1%} of the reference's; {state}"
        )
