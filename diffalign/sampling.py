"""Moving in t: one Gaussian step is DDIM, DDIM inversion, DDPM, Euler-ancestral and flow Euler.

Every step returns (mean [B, C, h, w], std [B, 1, 1, 1]) of the next latent, so samplers, PSO and policy gradients need
nothing but these two and `log_prob`. Timesteps are per sample, [B], everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffalign.draws import Draws
from diffalign.schedule import Schedule
from diffalign.types import Cond, Key

Network = Callable[[Tensor, Tensor, Cond], Tensor]
"""A denoiser: (x_t [B, C, h, w], t [B], cond) -> prediction [B, C, h, w]."""

Step = tuple[Tensor, Tensor]


def _wide(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0][:, None, None, None], pair[1][:, None, None, None]


def gaussian_step(schedule: Schedule, out: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, eta: float = 0.0) -> Step:
    """The transition from t to t_next with network output `out` (Song et al., 2021, eq. 12 and 16).

    eta 0 is DDIM, and Euler for flows; t_next above t is inversion; eta 1 is the DDPM posterior and Euler-ancestral.
    """
    x0, eps = schedule.split(out, x_t, t)
    a, s = _wide(schedule.coefficients(t))
    a_next, s_next = _wide(schedule.coefficients(t_next))
    std = torch.zeros_like(s_next)
    if eta:
        std = eta * s_next * (1 - (a * s_next / (a_next * s)) ** 2).clamp(min=0).sqrt()
    return a_next * x0 + (s_next**2 - std**2).clamp(min=0).sqrt() * eps, std


def renoise_step(schedule: Schedule, out: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor) -> Step:
    """Predict x0 and noise it afresh to t_next: consistency models (LCM), DMD2, one-step generators."""
    x0, _ = schedule.split(out, x_t, t)
    a_next, s_next = _wide(schedule.coefficients(t_next))
    return a_next * x0, s_next


def flow_sde_step(out: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, noise_level: float) -> Step:
    """Stochastic flow step with the marginals of the ODE (Flow-GRPO, Liu et al., 2025, eq. 9).

    sigma_t = noise_level sqrt(t / (1 - t)); mean = x + (v + sigma^2 / (2 t) (x + (1 - t) v)) dt; std = sigma sqrt(-dt).
    t is capped at 0.99, where sigma would diverge.
    """
    x_t, v = x_t.float(), out.float()
    t_, dt = _wide((t, t_next - t))
    sigma2 = noise_level**2 * t_ / (1 - t_.clamp(max=0.99))
    drift = v + sigma2 / (2 * t_.clamp(min=1e-8)) * (x_t + (1 - t_) * v)
    return x_t + drift * dt, (sigma2 * -dt).sqrt()


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of N(mean, std^2) at x, averaged over C, h, w: float32 [B]. std must be positive."""
    x, mean, std = x.float(), mean.float(), std.float()
    terms = -((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).mean(1)


def guided(
    denoiser: Network, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond | None = None, scale: float = 1.0
) -> Tensor:
    """Classifier-free guidance uncond + scale (cond - uncond) in one forward of the doubled batch.

    scale 1, or no uncond, is one plain forward.
    """
    if uncond is None or scale == 1.0:
        return denoiser(x_t, t, cond)
    with_prompt, without = denoiser(x_t.repeat(2, 1, 1, 1), t.repeat(2), Cond.cat([cond, uncond])).chunk(2)
    return without + scale * (with_prompt - without)


def sample(
    denoiser: Network,
    schedule: Schedule,
    cond: Cond,
    noise: Tensor,
    timesteps: Tensor,
    *,
    uncond: Cond | None = None,
    guidance: float = 1.0,
    eta: float = 0.0,
    draws: Draws | None = None,
    keys: Sequence[Key] = (),
    end: float = -1,
) -> Tensor:
    """From noise [B, C, h, w] through descending timesteps [S] to the clean latents at `end` (-1 for VP, 0 for flow).

    eta > 0 adds noise keyed by (key, step); it needs draws and B keys.
    """
    x, batch = noise, len(noise)
    steps = [*timesteps.tolist(), end]
    for k, (now, then) in enumerate(zip(steps, steps[1:], strict=False)):
        t = torch.full((batch,), now, device=x.device, dtype=timesteps.dtype)
        out = guided(denoiser, x, t, cond, uncond, guidance)
        x, std = gaussian_step(schedule, out, x, t, torch.full_like(t, then), eta)
        if eta:
            if draws is None:
                raise ValueError("sample with eta > 0 draws noise: pass draws and one key a sample")
            x = x + std * draws.normal([(key, k) for key in keys], x.shape[1:], stream="sampler").to(x.device)
    return x


def invert(
    denoiser: Network, schedule: Schedule, cond: Cond, x0: Tensor, t: Tensor, *, steps: int, start: float = -1
) -> Tensor:
    """DDIM inversion of each x0 [B, C, h, w] to exactly its own t [B], in `steps` equal steps from the clean end.

    Each step asks the network at the level it starts from, the first one at t = 0 since no network knows level -1.
    """
    x, now = x0.float(), torch.full_like(t, start)
    for k in range(1, steps + 1):
        then = start + (t - start) * (k / steps)
        then = then if t.is_floating_point() else then.round().to(t.dtype)
        asked = now.clamp(min=0)
        _, eps = schedule.split(denoiser(x, asked, cond), x, asked)
        a, s = _wide(schedule.coefficients(now))
        a_next, s_next = _wide(schedule.coefficients(then))
        x, now = a_next * (x - s * eps) / a + s_next * eps, then
    return x
