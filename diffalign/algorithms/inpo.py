"""DDIM-InPO (Lu et al., 2025) and SmPO (Lu et al., 2025): Diffusion-DPO on the model's own trajectories.

    x_t = DDIM inversion of x0 to level t;  tau = (x_t - a x0) / s;  Diffusion-DPO's loss at x_t with eps := tau
    SmPO: the margin times smoothing * tanh(gap / (2 score_range)), gap the score of the winner less the loser's

The network is asked where its own inversion of the image passes at level t, and for the noise that this implies. SmPO's
weight is smoothing * (2 p - 1) with p the softmax over the pair of its scores, scaled by their range over the data set.

Differs from the released codes of both:
- every pair has a timestep of its own at any batch size (there the first one's is used for all: one pair a device);
- the inversion ends on the level that the loss uses (there on the next level of a grid of 10 or 5; landing = official);
- no noise during the inversion unless asked for (InPO there: inversion.eta = 0.1);
- at the clean end the network is asked at timestep 0 (there at -99);
- ReNoise asks at the level where a step lands, as its paper does (there at the one it leaves; landing = official).
Secondary notes on InPO say that the reference inverts; its code inverts with the policy, which is the default here.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffalign.algorithms.diffusion_dpo import DiffusionDPO, score_gap
from diffalign.diffusion.inversion import Inversion
from diffalign.diffusion.noising import Noised, Noising
from diffalign.diffusion.schedule import per_sample
from diffalign.diffusion.steps import Network
from diffalign.types import Cond, Drawn, LatentBatch


class InPO(DiffusionDPO):
    """Diffusion-DPO with inverted latents in place of noised ones.

    Positional: policy, reference, noising, the number of values in a latent, the inversion, the unwrapped denoiser that
    trains, and the Cond of batch 1 of the empty prompt.

    Args:
        beta: strength of the pull to the reference, in the unit of Diffusion-DPO (2000 for SD1.5, 5000 for SDXL)
        loss: which function of the margin; see diffalign/objectives/preference.py
        label_smoothing: assumed share of wrong labels, where the loss uses one and a pair does not say its own
        invert_by: the policy as it is, or the reference; then each inversion can be kept (data.draws_per_sample)
        smoothing: SmPO's weight for a pair with a clear difference in scores (10 as released); 0 for plain InPO
        score_range: largest less smallest score of the data set, SmPO's unit (0.1666 for PickScore on Pick-a-Pic v2)
    """

    remembers_latents = True

    def __init__(
        self,
        policy: nn.Module,
        reference: Network,
        noising: Noising,
        dims: int,
        inversion: Inversion,
        denoiser: Network,
        empty: Cond,
        *,
        beta: float = 2000.0,
        loss: str = "dpo",
        label_smoothing: float = 0.0,
        invert_by: Literal["policy", "reference"] = "policy",
        smoothing: float = 0.0,
        score_range: float = 1.0,
    ):
        super().__init__(policy, reference, noising, dims, beta=beta, loss=loss, label_smoothing=label_smoothing)
        # Ranks invert to different depths: with DDP's wrapper around it, every forward would have to be matched.
        self.denoiser, self.inversion, self.empty, self.invert_by = denoiser, inversion, empty, invert_by
        self.smoothing, self.score_range = smoothing, score_range

    @staticmethod
    def check(cfg: dict[str, Any], data: dict[str, Any]) -> list[str]:
        """What cannot work in an `algorithm` section with this `data` section, one line each."""
        problems = DiffusionDPO.check({**cfg, "offset_scale": 0.0, "sft_weight": 0.0}, data)
        if data["draws_per_sample"] and cfg["invert_by"] == "policy":
            problems.append(
                "'data.draws_per_sample' keeps what the reference computes, but the policy inverts; set "
                "'algorithm.invert_by' = reference or leave it out"
            )
        if cfg["smoothing"] < 0 or not cfg["score_range"] > 0:
            problems.append("'algorithm.smoothing' must be 0 or more and 'algorithm.score_range' positive")
        if cfg["smoothing"] and cfg["loss"] == "clipped":
            problems.append("'algorithm.smoothing' weights the margin, which loss 'clipped' has none of; use dpo")
        return problems

    def noised(self, batch: LatentBatch) -> Noised:
        """The batch's 2B images, inverted to the timestep of their pair, with the noise this implies."""
        schedule = self.noising.schedule
        drawn = self._drawn(batch)
        t = drawn.t[batch.group]
        x_t = self._inverted(batch, t) if drawn.x_t is None else drawn.x_t
        a, s = map(per_sample, schedule.coefficients(t))
        return self.noising.at(x_t, batch.x0, (x_t - a * batch.x0) / s, t, batch.sample_cond)

    def draw(self, batch: LatentBatch) -> LatentBatch:
        if self.remembered:
            return super().draw(batch)
        t = self.noising.sample(batch.keys)
        return batch._replace(drawn=Drawn(t, path=self.inversion.path(t[batch.group].cpu())))

    def _inverted(self, batch: LatentBatch, t: Tensor) -> Tensor:
        cond = batch.sample_cond
        uncond = self.empty.repeat(len(t))._replace(size=cond.size)
        inverter = self.denoiser if self.invert_by == "policy" else self.reference
        assert inverter is not None
        keys = batch.sample_keys if self.inversion.eta else ()
        return self.inversion(inverter, batch.x0, t, cond, uncond, keys, batch.drawn and batch.drawn.path)

    def betas(self, batch: LatentBatch) -> float | Tensor:
        """beta, times SmPO's weight [B] where it is asked for; negative where the scores contradict the label."""
        if not self.smoothing:
            return self.beta
        return self.beta * self.smoothing * torch.tanh(score_gap(batch) / (2 * self.score_range))
