"""Gaussian sampling steps: DDIM, DDIM inversion, DDPM, Euler-ancestral, flow Euler, LCM, and stochastic flow steps.

Every step returns mean [B, C, h, w] and std [B, 1, 1, 1] of the next latent. Samplers, PSO and policy gradients need
only these and `log_prob`. Timesteps are per sample, [B].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from diffalign.diffusion.schedule import FlowSchedule, Schedule, per_sample, upcast
from diffalign.types import Cond

Network = Callable[[Tensor, Tensor, Cond], Tensor]
"""A denoiser: (x_t [B, C, h, w], t [B], cond) -> out [B, C, h, w]."""

Step = tuple[Tensor, Tensor]
"""mean [B, C, h, w] and std [B, 1, 1, 1] of the next latent, float32."""


def gaussian_step(schedule: Schedule, out: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, eta: float = 0.0) -> Step:
    """DDIM step from t to t_next with the network output `out` at (x_t, t) (Song et al., 2021, eq. 12, 16).

    mean = a2 x0 + sqrt(s2^2 - std^2) eps;  std = eta s2 sqrt(1 - (a s2 / (a2 s))^2), and 0 where t_next >= t.
    eta 0 is deterministic DDIM, and Euler for flows; with t_next > t it is DDIM inversion. eta 1 is the DDPM posterior
    and Euler-ancestral.
    """
    x0, eps = schedule.split(out, x_t, t)
    a, s = map(per_sample, schedule.coefficients(t))
    a2, s2 = map(per_sample, schedule.coefficients(t_next))
    std = torch.zeros_like(s2)
    if eta:
        std = eta * s2 * (1 - (a * s2 / (a2 * s)) ** 2).clamp(min=0).sqrt()
    return a2 * x0 + (s2**2 - std**2).clamp(min=0).sqrt() * eps, std


def renoise_step(
    schedule: Schedule, out: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, eta: float | Tensor = 1.0
) -> Step:
    """Step that predicts x0 and adds noise again: N(a2 x0 + s2 sqrt(1 - eta^2) eps, eta^2 s2^2).

    eta is the share of new noise: 1 for LCM, DMD2 and one-step generators, 0 for DDIM, a random tensor [B, 1, 1, 1] for
    R0. LCM's boundary scaling (x0 <- c_out x0 + c_skip x_t, c_skip <= 7e-6 for t >= 19) is omitted.
    """
    x0, eps = schedule.split(out, x_t, t)
    a2, s2 = map(per_sample, schedule.coefficients(t_next))
    if isinstance(eta, float) and eta == 1:
        return a2 * x0, s2
    kept = torch.as_tensor(1 - eta**2).sqrt()
    return a2 * x0 + s2 * kept * eps, eta * s2


def flow_sde_step(
    schedule: FlowSchedule, out: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, noise_level: float
) -> Step:
    """Stochastic flow step with the marginals of the ODE (Flow-GRPO, Liu et al., 2025, arXiv 2505.05470).

    dt = t_next - t < 0;  sigma = noise_level sqrt(t / (1 - t));
    mean = x_t + (v + sigma^2 / (2 t) eps) dt;  std = sigma sqrt(-dt).
    sigma diverges at t = 1; there 1 - t_next replaces 1 - t, as in the released code.
    """
    x0, eps = schedule.split(out, x_t, t)
    a, s = map(per_sample, schedule.coefficients(t))
    a2, s2 = map(per_sample, schedule.coefficients(t_next))
    dt = s2 - s
    strength = noise_level**2 / torch.where(a == 0, a2, a)  # sigma^2 / t, finite at t = 0
    return upcast(x_t) + (eps - x0 + strength / 2 * eps) * dt, (strength * s * -dt).sqrt()


def cps_step(schedule: FlowSchedule, out: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, noise_level: float) -> Step:
    """Stochastic flow step that keeps the coefficients of x0 and noise (CPS, as in Flow-GRPO's later settings).

    std = t_next sin(noise_level pi / 2);  mean = (1 - t_next) x0 + sqrt(t_next^2 - std^2) eps. It does not keep the
    marginals of the ODE. Its log density is taken without variance and constants: `squared_log_prob`.
    """
    x0, eps = schedule.split(out, x_t, t)
    a2, s2 = map(per_sample, schedule.coefficients(t_next))
    return a2 * x0 + s2 * math.cos(noise_level * math.pi / 2) * eps, s2 * math.sin(noise_level * math.pi / 2)


def squared_log_prob(x: Tensor, mean: Tensor) -> Tensor:
    """-mean_n (x - mean)^2, the log density of a CPS step without variance and constants: float32 [B]."""
    return -(upcast(x) - upcast(mean)).square().flatten(1).mean(1)


def log_prob(x: Tensor, mean: Tensor, std: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Log density of N(mean, std^2) at x, averaged (or summed) over C, h, w: float32 [B].

    x, mean [B, C, h, w] and std [B, 1, 1, 1]. Deterministic steps (eta 0, or the last step) have std 0 and no density.
    On the CPU they raise ValueError. On an accelerator the result is not finite instead: a check would force a
    synchronisation.
    """
    if std.device.type == "cpu" and not (std > 0).all():
        raise ValueError(
            f"log_prob needs std > 0, got {std.flatten().tolist()}; use eta > 0 and leave out the last sampling step"
        )
    x, mean, std = upcast(x), upcast(mean), upcast(std)
    terms = -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).mean(1) if reduction == "mean" else terms.flatten(1).sum(1)


def guided(
    denoiser: Network,
    x_t: Tensor,
    t: Tensor,
    cond: Cond,
    uncond: Cond | None,
    scale: float,
    rescaled: Callable[[Tensor, Tensor], Tensor] = lambda out, conditional: out,
) -> Tensor:
    """Prediction with classifier-free guidance, uncond + scale (cond - uncond), in one forward of the doubled batch.

    With scale 1 or without uncond it is one conditional forward. Ho & Salimans, 2022. `rescaled` gets the guided and
    the conditional prediction, both [B, C, h, w].
    """
    if uncond is None or scale == 1:
        return denoiser(x_t, t, cond)
    with_prompt, without = denoiser(x_t.repeat(2, 1, 1, 1), t.repeat(2), Cond.cat([cond, uncond])).chunk(2)
    return rescaled(without + scale * (with_prompt - without), with_prompt)
