"""Walks with a model's own sampler: parity with stock pipelines and their noise, timesteps, densities, random eta."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from diffusers.schedulers import scheduling_flow_match_euler_discrete

from diffalign.backbones import load_backbone
from diffalign.draws import Draws
from diffalign.sampler import Sampler, few_step_scheduler
from diffalign.sampling import gaussian_step, log_prob, renoise_step
from diffalign.schedule import VPSchedule
from diffalign.types import Cond

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TRAILING = {"timestep_spacing": "trailing"}
PROMPTS = ["small red circle on white", "large blue square left on black"]
KEYS = [(0, "a"), (0, "b")]


@pytest.fixture
def with_scheduler(tmp_path: Path, tiny_sd: Path, tiny_sd3: Path) -> Callable[..., Path]:
    """with_scheduler(scheduler, flow=False): a copy of a tiny pipeline that samples by it."""

    def make(scheduler: Any, flow: bool = False) -> Path:
        shutil.copytree(tiny_sd3 if flow else tiny_sd, tmp_path / "pipeline")
        scheduler.save_pretrained(tmp_path / "pipeline" / "scheduler")
        index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
        return tmp_path / "pipeline"

    return make


def walks(path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[torch.Tensor, torch.Tensor, Sampler]:
    """Images of our sampler, and of the stock pipeline with the same keyed generators."""
    draws = Draws(0)
    backbone = load_backbone(torch.device("cpu"), path=str(path), max_sequence_length=8)
    sampler = Sampler(backbone, draws, 32, **settings)
    ours = backbone.decode(sampler.sample(backbone.denoiser, backbone.encode_text(PROMPTS), KEYS))
    index = json.loads((path / "model_index.json").read_text())
    pipeline = DiffusionPipeline.from_pretrained(path, **{k: None for k, v in index.items() if v == [None, None]})
    pipeline.set_progress_bar_config(disable=True)
    more: dict[str, Any] = {"timesteps": list(settings["timesteps"])} if "timesteps" in settings else {}
    if "max_sequence_length" in inspect.signature(pipeline.__call__).parameters:
        more["max_sequence_length"] = 8
    generators = [draws.generator(key, "sampler") for key in KEYS]
    # The flow pipelines give their scheduler no generator.
    monkeypatch.setattr(
        scheduling_flow_match_euler_discrete,
        "randn_tensor",
        lambda shape, **more: torch.stack([torch.randn(shape[1:], generator=g) for g in generators]),
    )
    theirs = pipeline(
        PROMPTS,
        latents=draws.normal(KEYS, (backbone.latent_shape(32)), stream="latents"),
        generator=generators,
        num_inference_steps=len(sampler),
        guidance_scale=settings.get("guidance", 1.0),
        height=32,
        width=32,
        output_type="pt",
        **more,
    ).images
    return ours.detach(), theirs, sampler


@pytest.mark.parametrize(
    ("scheduler", "flow", "settings", "law"),
    [
        (LCMScheduler(**SD), False, {"steps": 4}, "renoise"),
        (LCMScheduler(**SD), False, {"timesteps": (999, 749, 499, 249)}, "renoise"),  # DMD2, four steps
        (LCMScheduler(**SD), False, {"timesteps": (399,)}, "renoise"),  # DMD2, one step on unit noise
        (EulerAncestralDiscreteScheduler(**SD, **TRAILING), False, {"steps": 4}, "ancestral"),  # Turbo
        (
            EulerAncestralDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1),
            False,
            {"steps": 3},
            "ancestral",
        ),
        (
            EulerAncestralDiscreteScheduler(
                **SD, **TRAILING, prediction_type="v_prediction", rescale_betas_zero_snr=True
            ),
            False,
            {"steps": 4},
            "ancestral",
        ),
        (DDIMScheduler(**SD, **TRAILING, clip_sample=False), False, {"steps": 4, "guidance": 3.0}, "deterministic"),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), True, {"steps": 4}, "deterministic"),
        (FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True), True, {"steps": 4}, "renoise"),
    ],
)
def test_a_walk_is_what_the_stock_pipeline_draws(
    with_scheduler: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    scheduler: Any,
    flow: bool,
    settings: dict[str, Any],
    law: str,
) -> None:
    ours, theirs, sampler = walks(with_scheduler(scheduler, flow), monkeypatch, **settings)
    assert sampler.law == law
    # With zero terminal SNR diffusers' Euler-ancestral takes a = 2^-12 where the schedule says 0.
    bound = 1e-3 if scheduler.config.get("rescale_betas_zero_snr") else 1e-4
    torch.testing.assert_close(ours, theirs, atol=bound, rtol=0)


def turbo() -> VPSchedule:
    return VPSchedule.from_config(SD)


GRID = (999, 749, 499, 249)


def test_the_timesteps_are_those_of_the_models_own_scheduler(with_scheduler: Callable[..., Path]) -> None:
    """Not 750, 500, 250, 0, which the released PSO for DreamBooth trains."""
    backbone = load_backbone(
        torch.device("cpu"), path=str(with_scheduler(EulerAncestralDiscreteScheduler(**SD, **TRAILING)))
    )
    assert Sampler(backbone, Draws(0), 32, steps=4).timesteps.tolist() == list(GRID)
    lcm = few_step_scheduler(backbone.scheduler_config)
    assert lcm["_class_name"] == "LCMScheduler" and lcm["beta_end"] == 0.012
    backbone.scheduler_config = lcm
    assert Sampler(backbone, Draws(0), 32, steps=4).timesteps.tolist() == [999, 759, 499, 259]
    assert Sampler(backbone, Draws(0), 32, steps=1).timesteps.tolist() == [999]
    with pytest.raises(ValueError, match=r"must descend"):
        Sampler(backbone, Draws(0), 32, timesteps=(249, 499))
    with pytest.raises(ValueError, match=r"begin at 1000; this model's last timestep is 999"):
        Sampler(backbone, Draws(0), 32, timesteps=(1000, 499))
    assert Sampler.check({"steps": 0, "timesteps": (3, 3)}) == [
        "'sampler.steps' = 0 must be 1 or more",
        "'sampler.timesteps' = [3, 3] must descend",
    ]


def test_standard_deviations_and_expected_densities_of_turbo_and_dmd2() -> None:
    """Turbo's are in its own coordinates, x sqrt(1 + sigma^2). E log p = -1/2 - ln std - ln sqrt(2 pi)."""
    schedule = turbo()
    t, t_next = torch.tensor(GRID[:3]), torch.tensor(GRID[1:])
    x, out = torch.zeros(3, 4, 64, 64), torch.zeros(3, 4, 64, 64)
    a_next = schedule.coefficients(t_next)[0]
    for (mean, std), scale, stds, densities in (
        (gaussian_step(schedule, out, x, t, t_next, 1.0), a_next, (3.9193, 1.4816, 0.6259), (-2.785, -1.812, -0.950)),
        (
            renoise_step(schedule, out, x, t, t_next),
            torch.ones(3),
            (0.97128, 0.84990, 0.56971),
            (-1.390, -1.256, -0.856),
        ),
    ):
        std = std / scale[:, None, None, None]
        torch.testing.assert_close(std.flatten(), torch.tensor(stds), atol=1e-4, rtol=0)
        drawn = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(log_prob(drawn, mean, std), torch.tensor(densities), atol=1e-2, rtol=0)


def test_eta_of_renoising() -> None:
    """0 is DDIM, 1 uses no eps, between them the variance of fresh noise is eta^2 s^2."""
    schedule, g = turbo(), torch.Generator().manual_seed(0)
    x, out = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g)
    t, t_next = torch.tensor([999, 499]), torch.tensor([749, 249])
    mean, std = renoise_step(schedule, out, x, t, t_next, 0.0)
    torch.testing.assert_close(mean, gaussian_step(schedule, out, x, t, t_next)[0])
    assert (torch.as_tensor(std) == 0).all()
    half_mean, half_std = renoise_step(schedule, out, x, t, t_next, torch.full((2, 1, 1, 1), 0.5))
    a, s = (c[:, None, None, None] for c in schedule.coefficients(t_next))
    x0, eps = schedule.split(out, x, t)
    torch.testing.assert_close(half_mean, a * x0 + s * math.sqrt(0.75) * eps)
    torch.testing.assert_close(half_std, 0.5 * s)


@pytest.mark.parametrize(("eta", "variance"), [(0.0, 0.1112), (0.5, 0.1080), (1.0, 0.0745)])
def test_variance_of_renoised_samples_on_a_gaussian(eta: float, variance: float) -> None:
    """R7: exact scores of N(.3, .25), cosine levels, four steps; the linear recursion and 2e5 samples agree to 1 %."""
    mu, u = 0.3, 0.25
    levels = [math.pi / 2 * k / 4 * 0.999 for k in (4, 3, 2, 1, 0)]
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = 1.0
    for k, (now, then) in enumerate(itertools.pairwise(levels)):
        a, b, a2, b2 = math.cos(now), math.sin(now), math.cos(then), math.sin(then)
        gain = a * u / (a * a * u + b * b)
        x0 = mu + gain * (x - a * mu)
        eps = (x - a * x0) / b
        noise = torch.randn(200_000, generator=torch.Generator().manual_seed(k + 1), dtype=torch.float64)
        x = a2 * x0 + b2 * (math.sqrt(1 - eta**2) * eps + eta * noise)
        c1 = a2 * gain + b2 * math.sqrt(1 - eta**2) * (1 - a * gain) / b
        spread = c1**2 * spread + (b2 * eta) ** 2
    assert x.var().item() == pytest.approx(spread, rel=0.01)
    assert spread == pytest.approx(variance, rel=0.02)


def test_draws_depend_on_keys_alone_and_only_graded_moves_have_a_graph(tiny_sd: Path) -> None:
    backbone = load_backbone(torch.device("cpu"), path=str(tiny_sd))
    cond = backbone.encode_text(PROMPTS)
    sampler = Sampler(backbone, Draws(0), 32, steps=3, law="random")
    both = sampler.walk(backbone.denoiser, cond, KEYS, graded=(1,))
    alone = sampler.walk(backbone.denoiser, cond.at(torch.tensor([1])), KEYS[1:])
    torch.testing.assert_close(both[-1].x_next[1:], alone[-1].x_next, atol=1e-5, rtol=1e-5)
    assert [move.out.requires_grad for move in both] == [False, True, False]
    assert both[0].std[0] != both[0].std[1]  # an eta for each sample
    assert (both[-1].std == 0).all()
    torch.testing.assert_close(both[-1].x_next, both[-1].x0)
    assert len(sampler.walk(backbone.denoiser, cond, KEYS, stop=0)) == 1
    assert {sampler.draw_step([(k, "x")], 1) for k in range(50)} == {1, 2}


def test_guidance_keeps_the_size_of_the_image(tiny_sdxl: Path) -> None:
    backbone = load_backbone(torch.device("cpu"), path=str(tiny_sdxl))
    sampler = Sampler(backbone, Draws(0), 32, steps=2, guidance=3.0)
    seen: list[Cond] = []

    def network(x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        seen.append(cond)
        return x_t

    size = torch.tensor([[64.0, 48, 0, 0, 32, 32]])
    sampler.sample(network, backbone.encode_text(PROMPTS[:1])._replace(size=size), KEYS[:1])
    assert all(torch.equal(c.size, size.repeat(2, 1)) for c in seen if c.size is not None) and len(seen) == 2
