"""Sampling steps: parity with diffusers' schedulers on several timestep grids, densities, guidance.

Each test evaluates a whole grid as one batch with one timestep per sample; diffusers runs in a loop. Latents and
network outputs are random. The tolerance is relative, 1e-5, where x0 = (x - s out)/a is large.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from chains import chain
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor

from diffalign.diffusion.schedule import FlowSchedule, Prediction, Schedule, VPSchedule
from diffalign.diffusion.steps import flow_sde_step, gaussian_step, guided, log_prob, renoise_step
from diffalign.draws import Draws
from diffalign.types import Cond

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
EPS, V = {"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}
ZERO_SNR = V | {"rescale_betas_zero_snr": True}  # with eps-prediction x0 = (x - s out) / 0 at the last timestep
PREDICTIONS = pytest.mark.parametrize("prediction", [EPS, V, ZERO_SNR], ids=["eps", "v", "v zero snr"])
STEPS = (1, 4, 10, 50)
SPACINGS = ("leading", "trailing", "linspace")
COND = Cond(torch.zeros(1, 1, 1))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def normal(n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def per_step(n: int, step: Callable[[int, torch.Generator], Any]) -> tuple[Tensor, Tensor]:
    """diffusers' next latents at n grid positions, and the noise from a generator in the same state."""

    def seeded(i: int) -> Tensor:
        torch.manual_seed(i)  # before diffusers 0.36 the flow scheduler ignores its generator
        return step(i, torch.Generator().manual_seed(i)).prev_sample

    theirs = torch.cat([seeded(i) for i in range(n)])
    noise = [torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(n)]
    return theirs, torch.cat(noise)


def before(grid: Tensor, steps: int) -> Tensor:
    """Next timestep of diffusers' DDIM: T // steps below t, or the clean level.

    With linspace spacing, or if steps does not divide T, it differs from the next timestep of the grid, at which
    the network runs next. `chain` steps to the next one; this test compares the step that diffusers documents.
    """
    return (grid - 1000 // steps).clamp(min=-1)


def after(grid: Tensor) -> Tensor:
    """The next timestep of the grid, and the clean level after the last."""
    return torch.cat([grid[1:], torch.tensor([-1])])


@PREDICTIONS
@pytest.mark.parametrize("alpha_to_one", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim(prediction: dict, alpha_to_one: bool, eta: float, spacing: Any) -> None:
    """At abar = 0 and eta 1 the noise in the mean has the coefficient sqrt(s2^2 - s2^2). diffusers' rounding makes it
    2e-4 or nan there, so that one transition is compared with N(a2 x0, s2^2), x0 = -v.
    """
    config = SD | prediction | {"set_alpha_to_one": alpha_to_one, "clip_sample": False, "timestep_spacing": spacing}
    schedule = VPSchedule.from_config(config)
    for steps in STEPS:
        theirs: Any = DDIMScheduler(**config, steps_offset=1)
        theirs.set_timesteps(steps)
        t = schedule.grid(steps, spacing, 1)
        x, out, noise = normal(steps, 0), normal(steps, 1), normal(steps, 2)
        expected = []
        for i, level in enumerate(theirs.timesteps):
            one = slice(i, i + 1)
            step = theirs.step(out[one], level, x[one], eta=eta, variance_noise=noise[one] if eta else None)
            expected.append(step.prev_sample)
        if eta == 1 and prediction is ZERO_SNR and t[0] == 999:
            a2, s2 = schedule.coefficients(before(t[:1], steps))
            expected[0] = -a2 * out[:1] + s2 * noise[:1]
        mean, std = gaussian_step(schedule, out, x, t, before(t, steps), eta)
        assert std.shape == (steps, 1, 1, 1)
        close(mean + std * noise, torch.cat(expected))


@PREDICTIONS
@pytest.mark.parametrize("alpha_to_one", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_inverse(prediction: dict, alpha_to_one: bool, spacing: str) -> None:
    """diffusers steps to `timestep` from T // steps below it, or from the clean level."""
    config = SD | prediction | {"set_alpha_to_one": alpha_to_one, "clip_sample": False, "timestep_spacing": spacing}
    schedule = VPSchedule.from_config(config)
    for steps in STEPS:
        theirs: Any = DDIMInverseScheduler(**config, steps_offset=1)
        theirs.set_timesteps(steps)
        x, out, t_next = normal(steps, 0), normal(steps, 1), theirs.timesteps
        expected, _ = per_step(steps, lambda i, _: theirs.step(out[i : i + 1], theirs.timesteps[i], x[i : i + 1]))  # noqa: B023
        mean, std = gaussian_step(schedule, out, x, before(t_next, steps), t_next)
        assert (std == 0).all()
        close(mean, expected)


@PREDICTIONS
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm(prediction: dict, spacing: str) -> None:
    """eta 1. DDPMScheduler goes to the next timestep of its grid and ends at abar = 1."""
    config = SD | prediction | {"clip_sample": False, "timestep_spacing": spacing}
    schedule = VPSchedule.from_config(config)
    for steps in STEPS:
        theirs: Any = DDPMScheduler(**config, steps_offset=1)
        theirs.set_timesteps(steps)
        x, out, t = normal(steps, 0), normal(steps, 1), theirs.timesteps
        expected, noise = per_step(
            steps,
            lambda i, g: theirs.step(out[i : i + 1], theirs.timesteps[i], x[i : i + 1], generator=g),  # noqa: B023
        )
        mean, std = gaussian_step(schedule, out, x, t, after(t), eta=1.0)
        close(mean + std * noise, expected)


@pytest.mark.parametrize("prediction", [EPS, V], ids=["eps", "v"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_ancestral(prediction: dict, spacing: str) -> None:
    """eta 1. diffusers works in variance-exploding coordinates: x / a = x0 + sigma eps with sigma = s / a.

    Zero terminal SNR is excluded: sigma is infinite and diffusers replaces abar = 0 by 2^-24. So is linspace with
    50 steps, whose timesteps are not integers.
    """
    config = SD | prediction | {"timestep_spacing": spacing, "steps_offset": 1}
    schedule = VPSchedule.from_config(config)
    for steps in STEPS if spacing != "linspace" else (1, 4, 10):
        theirs: Any = EulerAncestralDiscreteScheduler(**config)
        theirs.set_timesteps(steps)
        t = theirs.timesteps.long()
        assert torch.equal(t.float(), theirs.timesteps)
        t_next = after(t)
        x, out = normal(steps, 0), normal(steps, 1)
        a, a2 = (schedule.coefficients(level)[0][:, None, None, None] for level in (t, t_next))

        def step(i: int, g: torch.Generator) -> Any:
            level, x_ve = theirs.timesteps[i], (x / a)[i : i + 1]  # noqa: B023
            close(theirs.scale_model_input(x_ve, level), x[i : i + 1])  # noqa: B023
            return theirs.step(out[i : i + 1], level, x_ve, generator=g)  # noqa: B023

        expected, noise = per_step(steps, step)
        mean, std = gaussian_step(schedule, out, x, t, t_next, eta=1.0)
        close(mean + std * noise, expected * a2)


@PREDICTIONS
def test_lcm(prediction: dict) -> None:
    """LCM mixes c_skip = .25 / ((10 t)^2 + .25) of x_t into x0, which renoise_step omits.

    Up to 10 steps t >= 99 and that is below 1e-5. At 50 steps t = 19 is in the grid (c_skip 7e-6), so there the
    documented scaling is applied by hand.
    """
    config = SD | prediction | {"clip_sample": False}
    schedule = VPSchedule.from_config(config)
    for steps in STEPS:
        theirs: Any = LCMScheduler(**config)
        theirs.set_timesteps(steps)
        x, out, t = normal(steps, 0), normal(steps, 1), theirs.timesteps
        t_next = after(t)
        expected, noise = per_step(
            steps,
            lambda i, g: theirs.step(out[i : i + 1], theirs.timesteps[i], x[i : i + 1], generator=g),  # noqa: B023
        )
        mean, std = renoise_step(schedule, out, x, t, t_next)
        if steps == 50:
            c_skip, c_out = (c[:, None, None, None] for c in theirs.get_scalings_for_boundary_condition_discrete(t))
            mean = c_out * mean + c_skip * schedule.coefficients(t_next)[0][:, None, None, None] * x
        close(mean + std * noise, expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("stochastic", [False, True])
def test_flow_match_euler(shift: float, stochastic: bool) -> None:
    """Euler is gaussian_step with eta 0; diffusers' stochastic sampling is renoise_step."""
    for steps in STEPS:
        theirs: Any = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=stochastic)
        theirs.set_timesteps(steps)
        x, out = normal(steps, 0), normal(steps, 1)
        t, t_next = theirs.sigmas[:-1], theirs.sigmas[1:]
        expected, noise = per_step(
            steps,
            lambda i, g: theirs.step(out[i : i + 1], theirs.timesteps[i], x[i : i + 1], generator=g),  # noqa: B023
        )
        step = renoise_step if stochastic else gaussian_step
        mean, std = step(FlowSchedule(), out, x, t, t_next)
        close(mean + std * noise, expected)


def test_golden_euler_ancestral_levels() -> None:
    """SDXL-Turbo's grid 999, 749, 499, 249: sigma_up 3.9193, 1.4816, 0.6259 and the last step deterministic."""
    schedule = VPSchedule.from_config(SD)
    t, t_next = torch.tensor([999, 749, 499, 249]), torch.tensor([749, 499, 249, -1])
    _, std = gaussian_step(schedule, normal(4, 0), normal(4, 1), t, t_next, eta=1.0)
    up = std.flatten() / schedule.coefficients(t_next)[0]
    assert up.tolist() == pytest.approx([3.9193, 1.4816, 0.6259, 0], abs=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", [VPSchedule.from_config(SD), FlowSchedule()])
def test_with_the_true_noise_every_step_lands_on_the_marginal(schedule: Schedule, eta: float) -> None:
    """mean = a2 x0 + k eps with k^2 + std^2 = s2^2."""
    vp = isinstance(schedule, VPSchedule)
    t, t_next = torch.tensor([[900, 500, 20], [600, 499, -1]]) if vp else torch.tensor([[1.0, 0.6, 0.1], [0.7, 0.5, 0]])
    x0, eps = normal(3, 0), normal(3, 1)
    x_t, out = schedule.add_noise(x0, eps, t), schedule.target(x0, eps, t)
    mean, std = gaussian_step(schedule, out, x_t, t, t_next, eta)
    a2, s2 = (c[:, None, None, None] for c in schedule.coefficients(t_next))
    close(mean, a2 * x0 + (s2**2 - std**2).clamp(min=0).sqrt() * eps)
    assert (std <= s2).all()
    assert (std[:-1] > 0).all() == (eta > 0)
    assert std[-1] == 0


def test_inversion_is_deterministic_at_every_eta() -> None:
    schedule, t, t_next = VPSchedule.from_config(SD), torch.tensor([100, 300]), torch.tensor([100, 900])
    x, out = normal(2, 0), normal(2, 1)
    mean, std = gaussian_step(schedule, out, x, t, t_next, eta=1.0)
    assert (std == 0).all()
    close(mean, gaussian_step(schedule, out, x, t, t_next)[0])


def test_a_ddim_step_is_a_flow_euler_step() -> None:
    """x / (a + s) is a flow latent at level s / (a + s); in float64."""
    schedule = VPSchedule(VPSchedule.from_config(SD).alphas_cumprod.double(), Prediction.EPSILON)
    t, t_next = torch.tensor([999, 400, 3]), torch.tensor([700, 399, -1])
    x, out = normal(3, 0, torch.float64), normal(3, 1, torch.float64)
    scale, scale2 = (torch.stack(schedule.coefficients(level)).sum(0) for level in (t, t_next))
    level, level2 = schedule.coefficients(t)[1] / scale, schedule.coefficients(t_next)[1] / scale2
    x0, eps = schedule.split(out, x, t)
    ddim, _ = gaussian_step(schedule, out, x, t, t_next)
    flow, _ = gaussian_step(FlowSchedule(), eps - x0, x / scale[:, None, None, None], level, level2)
    assert torch.allclose(ddim / scale2[:, None, None, None], flow, atol=1e-12)


def test_zero_terminal_snr_starts_from_pure_noise() -> None:
    """At a = 0 a v-prediction implies x0 = -v; DDIM to t_next keeps the input as the noise."""
    schedule = VPSchedule.from_config(SD | ZERO_SNR)
    t, t_next = torch.tensor([999]), torch.tensor([500])
    x, v = normal(1, 0), normal(1, 1)
    a2, s2 = schedule.coefficients(t_next)
    close(gaussian_step(schedule, v, x, t, t_next)[0], -a2 * v + s2 * x)


def test_golden_flow_sde_step() -> None:
    """t .5 -> .25, level .8, x 1, v 2: sigma^2 = .64 * .5/.5 = .64, x + (1 - t) v = 2, drift 2 + .64 * 2 = 3.28,
    mean 1 - .25 * 3.28 = .18, variance .64 * .25 = .16. At t = 1 with t_next .6: 1 - t_next = .4, sigma^2 = 1.6, drift
    2 + .8 * 1 = 2.8, mean 1 - .4 * 2.8 = -.12, variance .64.
    """
    x, v = torch.ones(2, 1, 1, 1), 2 * torch.ones(2, 1, 1, 1)
    mean, std = flow_sde_step(FlowSchedule(), v, x, torch.tensor([0.5, 1.0]), torch.tensor([0.25, 0.6]), 0.8)
    assert mean.flatten().tolist() == pytest.approx([0.18, -0.12], abs=1e-6)
    assert std.flatten().tolist() == pytest.approx([0.4, 0.8], abs=1e-6)


def test_flow_sde_without_noise_is_euler() -> None:
    t, t_next = torch.tensor([1.0, 0.5, 0.1]), torch.tensor([0.5, 0.2, 0.0])
    x, out = normal(3, 0), normal(3, 1)
    mean, std = flow_sde_step(FlowSchedule(), out, x, t, t_next, 0.0)
    assert (std == 0).all()
    close(mean, gaussian_step(FlowSchedule(), out, x, t, t_next)[0])


@pytest.mark.parametrize(("noise_level", "steps", "variance"), [(0, 10, 1.079), (0.7, 10, 1.297), (0.7, 100, 1.412)])
def test_flow_sde_keeps_the_marginals(noise_level: float, steps: int, variance: float) -> None:
    """Data N(.3, 1.4), exact velocity: steps are affine in x, so mean and variance are followed exactly, from N(0, 1).

    With more steps all tend to 1.4; without the score correction the noise would add up to 1.565.
    """
    schedule, grid = FlowSchedule(), torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    mu, var = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for t, t_next in zip(grid[:-1, None], grid[1:, None], strict=True):
        x = torch.stack([mu, mu + 1])[:, :, None, None]
        total = (1 - t) ** 2 * 1.4 + t**2
        centred = x - (1 - t) * 0.3
        v = t / total * centred - (0.3 + (1 - t) * 1.4 / total * centred)
        mean, std = flow_sde_step(schedule, v, x, t.repeat(2), t_next.repeat(2), noise_level)
        slope = (mean[1] - mean[0]).flatten()
        mu, var = mean[0].flatten(), slope**2 * var + std[0].flatten() ** 2
    assert var.item() == pytest.approx(variance, abs=1e-3)
    assert mu.item() == pytest.approx(0.3, abs=0.02)


def test_log_prob_is_the_normal_density() -> None:
    x, mean, std = normal(3, 0), normal(3, 1), torch.tensor([0.1, 1.0, 7.0])[:, None, None, None]
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1)
    torch.testing.assert_close(log_prob(x, mean, std), expected.mean(1))
    torch.testing.assert_close(log_prob(x, mean, std, reduction="sum"), expected.sum(1))
    half = log_prob(x.half(), mean.half(), std)
    assert half.dtype == torch.float32
    assert half.shape == (3,)


def test_a_deterministic_step_has_no_density() -> None:
    x = normal(2, 0)
    with pytest.raises(ValueError, match=r"std > 0, got \[1\.0, 0\.0\]; use eta > 0"):
        log_prob(x, x, torch.tensor([1.0, 0.0])[:, None, None, None])


class Affine:
    """A network of three numbers: out = x/2 + t/1000 + prompt. Records the batch sizes of its calls."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.asked.append(len(x_t))
        return 0.5 * x_t + (t / 1000 + cond.tokens[:, 0, 0])[:, None, None, None]


def prompts(*values: float) -> Cond:
    return Cond(torch.tensor(values)[:, None, None])


def test_guidance_is_one_forward_of_the_doubled_batch() -> None:
    """Outputs differ by the prompts 1 and 0 only: guided = uncond + 3 * (1 - 0)."""
    network, x, t = Affine(), normal(2, 0), torch.tensor([10, 900])
    out = guided(network, x, t, prompts(1, 1), prompts(0, 0), 3.0)
    assert network.asked == [4]
    close(out, 0.5 * x + (t / 1000)[:, None, None, None] + 3)


@pytest.mark.parametrize(("uncond", "scale"), [(None, 7.5), (prompts(0, 0), 1.0)])
def test_without_guidance_one_conditional_forward(uncond: Cond | None, scale: float) -> None:
    network, x, t = Affine(), normal(2, 0), torch.tensor([10, 900])
    out = guided(network, x, t, prompts(1, 2), uncond, scale)
    assert network.asked == [2]
    assert torch.equal(out, Affine()(x, t, prompts(1, 2)))


def test_sampling_recovers_the_distribution_at_every_eta() -> None:
    """1-D data N(.3, 1.4) with its exact eps-network: mean and variance of 4000 samples within 4 standard errors,
    4 sqrt(1.4 / 4000) = .075 and 4 * 1.4 sqrt(2 / 4000) = .125; 250 steps leave a bias of .015.
    """
    schedule, draws = VPSchedule.from_config(SD), Draws(1)

    def network(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        a, s = (c[:, None, None, None] for c in schedule.coefficients(t))
        return s * (x - a * 0.3) / (a**2 * 1.4 + s**2)

    # 4000 samples are 4 x 1000 pixels: one key draws 1000 independent ones.
    for eta in (0.0, 1.0):
        noise = draws.normal(range(4), (1, 40, 25), stream="noise")
        x0 = chain(network, schedule, COND, noise, schedule.grid(250), eta, draws)
        assert x0.mean().item() == pytest.approx(0.3, abs=0.075)
        assert x0.var().item() == pytest.approx(1.4, abs=0.125)
