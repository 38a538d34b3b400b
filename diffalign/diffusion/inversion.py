"""DDIM inversion: from each image along the model's own trajectory to its own noise level (Song et al., 2021, 4.3)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.diffusion.schedule import Schedule, VPSchedule, per_sample, upcast
from diffalign.diffusion.steps import Network, gaussian_step, guided
from diffalign.draws import Draws
from diffalign.types import Cond, Key, Path


class Inversion:
    """Inverts latents of different depth in one batch: at each step only those that are not there yet are computed.

    The levels are those of a sampler with `steps` steps from pure noise, as far as a latent needs them, so an image at
    a middle level costs half of the steps. Each step asks the network at the level it leaves (at 0 for the clean end,
    which no network knows).

    Positional: the backbone's schedule and the run's draws.

    Args:
        steps: of a full inversion, from the clean latent to pure noise
        landing: exact ends on the level t_used for; official on the next grid level, as the released code of InPO and
            SmPO does with diffusers 0.20 although their losses use the level t_used for (eps- and v-prediction only)
        eta: noise added after each step, as a share of the DDPM posterior's; drawn by key, stream "inversion"
        renoise: corrections of each step by asking the network again where the step lands (ReNoise, Garibi et al.,
            2024, arXiv 2403.14602); with landing = official at the level it leaves, as SmPO's released code
        renoise_average: average all estimates of a step as SmPO does; false takes the last one, which converges to
            the exact inverse of a DDIM step
        guidance: classifier-free guidance scale; 1 for none
    """

    def __init__(
        self,
        schedule: Schedule,
        draws: Draws,
        *,
        steps: int = 10,
        landing: Literal["exact", "official"] = "exact",
        eta: float = 0.0,
        renoise: int = 0,
        renoise_average: bool = True,
        guidance: float = 1.0,
    ):
        self.schedule, self.draws = schedule, draws
        self.steps, self.landing, self.eta = steps, landing, eta
        self.renoise, self.renoise_average, self.guidance = renoise, renoise_average, guidance
        if landing == "official" and not isinstance(schedule, VPSchedule):
            raise ValueError("'inversion.landing' = official exists for eps- and v-prediction models only; use exact")

    @staticmethod
    def check(cfg: dict[str, Any]) -> list[str]:
        """What cannot work in an `inversion` section, one line each."""
        problems = []
        if cfg["steps"] < 1:
            problems.append(f"'inversion.steps' = {cfg['steps']} must be 1 or more")
        names = ("eta", "renoise", "guidance")
        problems += [f"'inversion.{k}' = {cfg[k]} must be 0 or more" for k in names if cfg[k] < 0]
        return problems

    def levels(self, t: Tensor) -> Tensor:
        """[steps + 1, B]: the levels a latent passes on its way to t [B]; those that have arrived stay where they are.

        Official grid for T = 1000 and 10 steps: clean, 1, 101, ..., 901; it ends on the first that is not below t.
        """
        clean, k = self.schedule.t_clean, torch.arange(self.steps + 1, device=t.device)[:, None]
        if not isinstance(self.schedule, VPSchedule):
            return torch.minimum(clean + k * (1.0 - clean) / self.steps, t)
        if self.landing == "exact":
            return torch.minimum((clean + k * self.schedule.num_timesteps / self.steps).round().long(), t)
        grid = 1 + (k - 1) * (self.schedule.num_timesteps // self.steps)
        grid[0] = clean
        landing = torch.where(grid[1:] >= t, grid[1:], grid[-1]).amin(0)
        return torch.minimum(grid, landing)

    def path(self, t: Tensor) -> Path:
        """The steps of latents on their way to t [B]. On the CPU nothing waits for a device."""
        levels, steps = self.levels(t), []
        for now, then in itertools.pairwise(levels):
            moving = (then > now).nonzero()[:, 0]
            if not len(moving):
                break
            steps.append((moving, now[moving], then[moving]))
        return steps

    @torch.no_grad()
    def __call__(
        self,
        network: Network,
        x0: Tensor,
        t: Tensor,
        cond: Cond,
        uncond: Cond | None,
        keys: Sequence[Key],
        path: Path | None = None,
    ) -> Tensor:
        """x0 [B, C, h, w], t [B], conds of batch B, B keys (of the eta noise) -> x_t [B, C, h, w], float32.

        path  path(t), where it was made before
        """
        x = upcast(x0)
        for k, (moving, now, then) in enumerate(self.path(t) if path is None else path):
            some = cond.at(moving)
            without = None if uncond is None or self.guidance == 1 else uncond.at(moving)
            x_next = self._step(network, x[moving], now, then, some, without)
            if self.eta:
                noise = self.draws.normal([(keys[i], k) for i in moving.tolist()], x.shape[1:], stream="inversion")
                x_next = x_next + self._posterior_std(now, then) * noise.to(x.device)
            x = x.index_copy(0, moving, x_next)
        return x

    def _step(self, network: Network, x: Tensor, now: Tensor, then: Tensor, cond: Cond, uncond: Cond | None) -> Tensor:
        """One step from `now` to the noisier `then`."""
        a, s = map(per_sample, self.schedule.coefficients(now))
        a2, s2 = map(per_sample, self.schedule.coefficients(then))
        source = now.clamp(min=0)
        estimates: list[Tensor] = []
        x_next, t_used = x, source
        for _ in range(1 + self.renoise):
            out = guided(network, x_next, t_used, cond, uncond, self.guidance)
            estimates.append(self.schedule.split(out, x_next, t_used)[1])
            eps = torch.stack(estimates).mean(0) if self.renoise_average else estimates[-1]
            # x lies at `now`, whichever level the network was given: x0 comes from x's own level.
            x_next = a2 * (x - s * eps) / a + s2 * eps
            t_used = source if self.landing == "official" else then
        return x_next

    def _posterior_std(self, now: Tensor, then: Tensor) -> Tensor:
        """eta times the deviation of the DDPM posterior of the step back, from `then` to `now`."""
        zero = torch.zeros(len(now), 1, 1, 1, device=now.device)
        return gaussian_step(self.schedule, zero, zero, then, now, self.eta)[1]
