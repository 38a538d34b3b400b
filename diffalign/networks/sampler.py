"""How a model walks from noise to an image while it trains: which timesteps, and the law of each transition.

A distilled model has few steps and a law of its own, which its scheduler's config names; training by rewards or on
samples of its own must use both, for at other timesteps it was never meant to be asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import diffusers
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from torch import Tensor

from diffalign.diffusion.noising import Noising
from diffalign.diffusion.schedule import Schedule, VPSchedule, per_sample
from diffalign.diffusion.steps import Network, Step, gaussian_step, guided, renoise_step
from diffalign.draws import Draws
from diffalign.networks.families.base import Backbone
from diffalign.types import Cond, Key

StepKind = Literal["deterministic", "ancestral", "renoise", "random"]
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
"""Scheduler class -> the law of its steps, and the settings without which it has another one.

Flow matching with `stochastic_sampling` renoises. Solvers that remember outputs (PNDM, DPM-Solver, UniPC) or that ask
twice a step (Heun) have no law.
"""
SUBSTITUTE = {
    "deterministic": "DDIMScheduler",
    "ancestral": "DDPMScheduler",
    "renoise": "LCMScheduler",
    "random": "LCMScheduler",
}
"""Kind of step -> the scheduler class that gives timesteps and end where the model's own has another kind or none."""


class Transition(NamedTuple):
    """One step of B samples: the network answers `out` at (x_t, t), by which it sees x0; x_next at t_next is drawn from
    N(mean, std^2).

    x_t, out, x0, mean, x_next [B, C, h, w]; t, t_next [B]; std [B, 1, 1, 1]
    """

    x_t: Tensor
    t: Tensor
    t_next: Tensor
    out: Tensor
    x0: Tensor
    mean: Tensor
    std: Tensor
    x_next: Tensor


class Sampler:
    """The sampling of a backbone as stock diffusers does it with the same noise: a pure function of each sample's key.

    Positional: the backbone, the draws of the run, and the images' width and height in pixels. The noise of a key is
    that of its generators: stream "latents" at the start, "sampler" on the way, as in tools/generate.py.

    Timesteps, noise levels, the scale of the first noise and the last step are those of the model's own scheduler, or,
    where its law is another, of DDIM, DDPM or LCM made from the same scheduler config. Raises ValueError where `law` is
    scheduler and no law steps as the model's own does, and for timesteps that the model does not have.

    Args:
        steps: how many; the timesteps are those of the scheduler
        timesteps: these instead, descending, as the model was distilled for (999, 749, 499, 249 or 399 for DMD2)
        law: of a step; scheduler is the model's own. deterministic (DDIM, Euler), ancestral (DDPM, Turbo), renoise
            (LCM, DMD2: predict x0, noise it afresh), or random, which renoises by a random part that each sample and
            step draws anew (R0)
        guidance: classifier-free guidance scale; 1 for distilled models
    """

    def __init__(
        self,
        backbone: Backbone,
        draws: Draws,
        resolution: int,
        *,
        steps: int = 4,
        timesteps: tuple[float, ...] = (),
        law: Literal["scheduler", "deterministic", "ancestral", "renoise", "random"] = "scheduler",
        guidance: float = 1.0,
    ):
        self.draws, self.guidance = draws, guidance
        self.shape, self.device = backbone.latent_shape(resolution), backbone.device
        discrete = isinstance(backbone.schedule, VPSchedule)
        self.law, scheduler = kind_and_scheduler(backbone.scheduler_config, law, discrete)
        ddim = isinstance(scheduler, DDIMScheduler)
        self.schedule = own_schedule(backbone.schedule, scheduler)
        if timesteps:
            self.timesteps = self.schedule.timesteps(timesteps)
        elif ddim or not discrete:
            self.timesteps = backbone.grid(steps, resolution)
        else:
            self.timesteps = own_timesteps(self.schedule, scheduler, steps)
        levels = self.timesteps.tolist()
        check_levels(self.schedule, levels)
        landings = [*levels[1:], self.schedule.t_clean]
        if ddim and not timesteps:
            # diffusers' DDIM goes down by T // steps, which linspace and uneven trailing grids do not.
            stride = len(scheduler.alphas_cumprod) // steps
            landings = [max(level - stride, self.schedule.t_clean) for level in levels]
        self.spans = list(zip(levels, landings, strict=True))
        # In sigma space diffusers starts from the largest sigma of the grid, which is s(t) of unit noise here.
        sigmas = isinstance(scheduler, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler)
        scaled = sigmas and scheduler.config["timestep_spacing"] != "leading"
        self.scale = self.schedule.coefficients(self.timesteps[:1])[1].item() if scaled else 1.0
        self.empty = backbone.encode_text([""]) if guidance != 1 else None

    @staticmethod
    def check(cfg: dict[str, Any]) -> list[str]:
        """What cannot work in a `sampler` section, one line each."""
        problems = []
        if cfg["steps"] < 1:
            problems.append(f"'sampler.steps' = {cfg['steps']} must be 1 or more")
        if cfg.get("guidance", 1) < 0:
            problems.append(f"'sampler.guidance' = {cfg['guidance']} must be 0 or more")
        if any(then >= now for now, then in itertools.pairwise(cfg["timesteps"])):
            problems.append(f"'sampler.timesteps' = {list(cfg['timesteps'])} must descend")
        return problems

    def __len__(self) -> int:
        return len(self.timesteps)

    def start(self, keys: Sequence[Key]) -> Tensor:
        """The latents [len(keys), C, h, w] where sampling begins."""
        return self.scale * self.draws.normal(keys, self.shape, stream="latents").to(self.device)

    def walk(
        self,
        network: Network,
        cond: Cond,
        keys: Sequence[Key],
        *,
        x: Tensor | None = None,
        graded: Collection[int] = (),
        stop: int | None = None,
    ) -> list[Transition]:
        """The transitions 0, 1, ... of B samples, through transition `stop` if given, else to the clean end.

        cond     batch of B
        keys     B keys; the noise on the way is drawn from them
        x        where to start [B, C, h, w]; `start(keys)` when left out
        graded   numbers of the transitions that carry gradients; the others run without
        """
        x = self.start(keys) if x is None else x
        generators = [self.draws.generator(key, "sampler") for key in keys]
        transitions: list[Transition] = []
        last = len(self) - 1 if stop is None else stop
        for k in range(last + 1):
            t, t_next = (torch.full((len(x),), level, device=x.device) for level in self.spans[k])
            with torch.set_grad_enabled(torch.is_grad_enabled() and k in graded):
                out = self.predict(network, x, t, cond)
                mean, std = self.step(out, x, t, t_next, [(key, self.spans[k][0]) for key in keys])
                x_next = mean
                if self.law != "deterministic" and k + 1 < len(self):  # the last step adds no noise by any law
                    noise = torch.stack([torch.randn(self.shape, generator=g) for g in generators])
                    x_next = mean + std * noise.to(x.device)
                x0, _ = self.schedule.split(out, x, t)
            transitions.append(Transition(x, t, t_next, out, x0, mean, std, x_next))
            x = x_next
        return transitions

    def predict(self, network: Network, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's answer [B, C, h, w] with the sampler's guidance."""
        uncond = None if self.empty is None else self.empty.repeat(len(x_t))._replace(size=cond.size)
        return guided(network, x_t, t, cond, uncond, self.guidance)

    def draw_step(self, keys: Sequence[Key], first: int = 0) -> int:
        """A transition from `first` on, the same for the whole micro-batch; stream "stop"."""
        return int(self.draws.integers([keys[0]], first, len(self), stream="stop"))

    def step(self, out: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, keys: Sequence[Key]) -> Step:
        """The law of the transition from t to t_next, all [B]: mean [B, C, h, w] and std [B, 1, 1, 1].

        keys     B times the key of the sample and its timestep, by which the random part is drawn; stream "eta"
        """
        if self.law == "deterministic":
            return gaussian_step(self.schedule, out, x_t, t, t_next)
        if self.law == "ancestral":
            return gaussian_step(self.schedule, out, x_t, t, t_next, eta=1.0)
        if self.law == "renoise":
            return renoise_step(self.schedule, out, x_t, t, t_next)
        eta = self.draws.uniform(keys, stream="eta")
        return renoise_step(self.schedule, out, x_t, t, t_next, per_sample(eta).to(x_t.device))

    def noising(self) -> Noising:
        """Training at the sampler's own timesteps and no others, with errors of the noise."""
        levels = tuple(self.timesteps.tolist())
        return Noising(self.schedule, self.draws, timesteps="grid", levels=levels, error_weight="epsilon")

    @torch.no_grad()
    def sample(self, network: Network, cond: Cond, keys: Sequence[Key], x: Tensor | None = None) -> Tensor:
        """Clean latents [B, C, h, w], without gradients."""
        return self.walk(network, cond, keys, x=x)[-1].x_next


def kind_and_scheduler(
    config: dict[str, Any], law: StepKind | Literal["scheduler"], discrete: bool
) -> tuple[StepKind, Any]:
    """The law of a walk, and the diffusers scheduler that has it: the one with this config, or its stand-in.

    discrete  whether timesteps are numbered (U-Nets), or levels of a flow

    Raises ValueError where `law` is scheduler and the scheduler has no law, with the setting that keeps it from one.
    """
    name = config["_class_name"]
    own, needed = SCHEDULERS.get(name, (None, {}))
    if own is not None:
        scheduler = getattr(diffusers, name).from_config(config)
        own = "renoise" if scheduler.config.get("stochastic_sampling") else own
        other = [f"{k} = {scheduler.config[k]}" for k, v in needed.items() if (scheduler.config.get(k) or v) != v]
        if not other and (law == "scheduler" or SUBSTITUTE[law] == SUBSTITUTE[own]):
            return own if law == "scheduler" else law, scheduler
        name = " with ".join([name, *other[:1]])
    if law == "scheduler":
        raise ValueError(
            f"'sampler.law' = scheduler: no law steps as {name} does; set 'sampler.law' to deterministic (DDIM), "
            "ancestral (DDPM) or renoise (LCM)"
        )
    stand_in = SUBSTITUTE[law] if discrete else "FlowMatchEulerDiscreteScheduler"
    return law, getattr(diffusers, stand_in).from_config(config)


def own_schedule(schedule: Schedule, scheduler: Any) -> Schedule:
    """A backbone's schedule with the noise levels and the clean end of a diffusers scheduler; a flow's as it is."""
    if not isinstance(schedule, VPSchedule):
        return schedule
    # All but DDIM end at x0 itself, whatever set_alpha_to_one says.
    clean = float(scheduler.final_alpha_cumprod) if isinstance(scheduler, DDIMScheduler) else 1.0
    return replace(schedule, alphas_cumprod=scheduler.alphas_cumprod.float(), clean=clean)


def own_timesteps(schedule: Schedule, scheduler: Any, steps: int) -> Tensor:
    """The descending timesteps [steps] that a diffusers scheduler chooses. ValueError where it cannot."""
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
    """ValueError for timesteps that do not descend to above the clean end, or that the model does not have."""
    if any(then >= now for now, then in itertools.pairwise([*levels, schedule.t_clean])):
        raise ValueError(f"'sampler.timesteps' must descend and end above {schedule.t_clean}; got {levels}")
    if isinstance(schedule, VPSchedule) and levels[0] > (last := schedule.num_timesteps - 1):
        raise ValueError(f"'sampler.timesteps' begin at {levels[0]}; this model's last timestep is {last}")


def few_step_scheduler(config: dict[str, Any]) -> dict[str, Any]:
    """The scheduler config of a model distilled from the one with this config: LCM's, or a flow's that renoises."""
    if config["_class_name"].startswith("FlowMatch"):
        return {**config, "stochastic_sampling": True}
    return {**diffusers.LCMScheduler.from_config(config).config, "_class_name": "LCMScheduler"}
