"""Schedulers of pipelines: kind of step, noise levels and timesteps, and a substitute for unsupported ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import diffusers
from diffusers import DDIMScheduler
from torch import Tensor

from diffalign.diffusion.schedule import Schedule, VPSchedule

StepKind = Literal["deterministic", "ancestral", "renoise", "random", "sde", "cps"]
FLOW_KINDS = ("sde", "cps")  # for flow models only
SCHEDULERS: dict[str, tuple[StepKind, dict[str, Any]]] = {
    "DDIMScheduler": ("deterministic", {"clip_sample": False, "thresholding": False}),
    "EulerDiscreteScheduler": (
        "deterministic",
        {
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "interpolation_type": "linear",
            "timestep_type": "discrete",
            "final_sigmas_type": "zero",
        },
    ),
    "DDPMScheduler": ("ancestral", {"clip_sample": False, "thresholding": False, "variance_type": "fixed_small"}),
    "EulerAncestralDiscreteScheduler": ("ancestral", {}),
    "LCMScheduler": ("renoise", {"clip_sample": False, "thresholding": False}),
    "FlowMatchEulerDiscreteScheduler": ("deterministic", {"invert_sigmas": False}),
}
"""Scheduler class -> its kind of step, and the settings that this kind requires.

Flow matching with `stochastic_sampling` is of kind renoise. Multistep solvers (PNDM, DPM-Solver, UniPC) and solvers
with two evaluations per step (Heun) are not supported: their steps are no Gaussian transitions.
"""
SUBSTITUTE = {
    "deterministic": "DDIMScheduler",
    "ancestral": "DDPMScheduler",
    "renoise": "LCMScheduler",
    "random": "LCMScheduler",
}
"""Kind of step -> scheduler class that replaces the model's own when that one is of another kind or unsupported."""


def kind_and_scheduler(
    config: dict[str, Any], law: StepKind | Literal["scheduler"], discrete: bool
) -> tuple[StepKind, Any]:
    """The kind of step, and a diffusers scheduler of that kind: the one of this config, or its substitute.

    discrete  whether timesteps are integers (U-Nets) or noise levels of a flow

    Raises ValueError if `law` is scheduler and the scheduler is not supported; the message names the setting.
    """
    name = config["_class_name"]
    own, needed = SCHEDULERS.get(name, (None, {}))
    if own is not None:
        scheduler = getattr(diffusers, name).from_config(config)
        own = "renoise" if scheduler.config.get("stochastic_sampling") else own
        other = [f"{k} = {scheduler.config[k]}" for k, v in needed.items() if (scheduler.config.get(k) or v) != v]
        if not other and (law == "scheduler" or SUBSTITUTE.get(law) == SUBSTITUTE[own]):
            return own if law == "scheduler" else law, scheduler
        name = " with ".join([name, *other[:1]])
    if law == "scheduler":
        raise ValueError(
            f"'sampler.law' = scheduler: the steps of {name} are not supported; set 'sampler.law' to deterministic "
            "(DDIM), ancestral (DDPM) or renoise (LCM)"
        )
    if discrete and law in FLOW_KINDS:
        raise ValueError(f"'sampler.law' = {law} is for flow models; for this model set it to ancestral or renoise")
    substitute = SUBSTITUTE[law] if discrete else "FlowMatchEulerDiscreteScheduler"
    return law, getattr(diffusers, substitute).from_config(config)


def own_schedule(schedule: Schedule, scheduler: Any) -> Schedule:
    """A backbone's schedule with the noise levels and final alpha of a diffusers scheduler (U-Nets only)."""
    if not isinstance(schedule, VPSchedule):
        return schedule
    # All schedulers but DDIM end at x0 itself and ignore set_alpha_to_one.
    clean = float(scheduler.final_alpha_cumprod) if isinstance(scheduler, DDIMScheduler) else 1.0
    return replace(schedule, alphas_cumprod=scheduler.alphas_cumprod.float(), clean=clean)


def own_timesteps(schedule: Schedule, scheduler: Any, steps: int) -> Tensor:
    """The descending timesteps [steps] of a diffusers scheduler. Raises ValueError for an unsupported number."""
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise ValueError(f"'sampler.steps' = {steps}: {error}") from error
    if len(scheduler.timesteps) != steps:
        name = type(scheduler).__name__
        raise ValueError(
            f"{name} makes {len(scheduler.timesteps)} steps of 'sampler.steps' = {steps}; use another number"
        )
    return schedule.timesteps(scheduler.timesteps.tolist())


def check_levels(schedule: Schedule, levels: Sequence[float]) -> None:
    """Raise ValueError unless timesteps descend, end above the clean level, and lie in the model's range."""
    if any(then >= now for now, then in itertools.pairwise([*levels, schedule.t_clean])):
        raise ValueError(f"'sampler.timesteps' must descend and end above {schedule.t_clean}; got {levels}")
    if isinstance(schedule, VPSchedule) and levels[0] > (last := schedule.num_timesteps - 1):
        raise ValueError(f"'sampler.timesteps' begin at {levels[0]}; this model's last timestep is {last}")


def few_step_scheduler(config: dict[str, Any]) -> dict[str, Any]:
    """Scheduler config of a few-step model distilled from a model with this config: LCM, or a stochastic flow."""
    if config.get("use_flow_sigmas"):  # a multistep solver of a flow
        config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": config["flow_shift"]}
    if config["_class_name"].startswith("FlowMatch"):
        config = {k: v for k, v in config.items() if k != "shift_terminal"}  # undefined for one step
        return {**config, "stochastic_sampling": True}
    return {**diffusers.LCMScheduler.from_config(config).config, "_class_name": "LCMScheduler"}
