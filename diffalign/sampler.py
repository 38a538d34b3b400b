"""How a model walks from noise to an image while it trains: which timesteps, and the law of each move.

A distilled model has few steps and a law of its own, which its scheduler's config names; training by rewards or on
samples of its own must use both, for at other timesteps it was never meant to be asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

import diffusers
import torch
from torch import Tensor

from diffalign.backbones import Backbone
from diffalign.draws import Draws
from diffalign.noising import Noising
from diffalign.sampling import Network, Step, gaussian_step, guided, renoise_step
from diffalign.schedule import VPSchedule, per_sample
from diffalign.types import Cond, Key

Law = Literal["deterministic", "ancestral", "renoise", "random"]
LAWS = {"EulerAncestralDiscreteScheduler": "ancestral", "LCMScheduler": "renoise"}
"""Scheduler class -> law. A flow scheduler with `stochastic_sampling` renoises; every other one is deterministic."""


class Move(NamedTuple):
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
    that of its generators: stream "latents" at the start, "sampler" on the way, as in eval/generate.py.

    Args:
        steps: how many; the timesteps are those of the model's own scheduler
        timesteps: these instead, descending, as the model was distilled for (999, 749, 499, 249 or 399 for DMD2)
        law: of a step; scheduler is the model's own. deterministic (DDIM, flow Euler), ancestral (Turbo), renoise (LCM,
            DMD2: predict x0, noise it afresh), or random, which renoises by a random part that each sample and step
            draws anew (R0)
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
        self.schedule, self.draws, self.guidance = backbone.schedule, draws, guidance
        self.shape, self.device = backbone.latent_shape(resolution), backbone.device
        self.law: Law = own_law(backbone.scheduler_config) if law == "scheduler" else law
        discrete = isinstance(self.schedule, VPSchedule)
        if timesteps:
            grid = torch.tensor(timesteps)
            self.timesteps = grid.long() if discrete else grid
        elif discrete and backbone.scheduler_config["_class_name"] in LAWS:
            self.timesteps = own_timesteps(backbone.scheduler_config, steps)
        else:
            self.timesteps = backbone.grid(steps, resolution)
        levels = [*self.timesteps.tolist(), self.schedule.t_clean]
        if any(then >= now for now, then in itertools.pairwise(levels)):
            raise ValueError(f"'sampler.timesteps' must descend and end above {levels[-1]}; got {levels[:-1]}")
        if isinstance(self.schedule, VPSchedule) and levels[0] >= self.schedule.num_timesteps:
            last = self.schedule.num_timesteps - 1
            raise ValueError(f"'sampler.timesteps' begin at {levels[0]}; this model's last timestep is {last}")
        self.levels = levels
        # diffusers starts Euler-ancestral from the largest sigma of the grid, which is s(t) of unit noise here.
        spacing = backbone.scheduler_config.get("timestep_spacing", "linspace")
        scaled = discrete and self.law == "ancestral" and spacing != "leading"
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
    ) -> list[Move]:
        """The moves 0, 1, ... of B samples, through move `stop` if given, else to the clean end.

        cond     batch of B
        keys     B keys; the noise on the way is drawn from them
        x        where to start [B, C, h, w]; `start(keys)` when left out
        graded   numbers of the moves that carry gradients; the others run without
        """
        x = self.start(keys) if x is None else x
        generators = [self.draws.generator(key, "sampler") for key in keys]
        moves: list[Move] = []
        last = len(self) - 1 if stop is None else stop
        for k in range(last + 1):
            t, t_next = (torch.full((len(x),), level, device=x.device) for level in self.levels[k : k + 2])
            with torch.set_grad_enabled(torch.is_grad_enabled() and k in graded):
                out = self.ask(network, x, t, cond)
                mean, std = self.transition(out, x, t, t_next, keys)
                noise = torch.stack([torch.randn(self.shape, generator=g) for g in generators]) if std.any() else 0
                x_next = mean + std * torch.as_tensor(noise, device=x.device)
                x0, _ = self.schedule.split(out, x, t)
            moves.append(Move(x, t, t_next, out, x0, mean, std, x_next))
            x = x_next
        return moves

    def ask(self, network: Network, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's answer [B, C, h, w] with the sampler's guidance."""
        uncond = None if self.empty is None else self.empty.repeat(len(x_t))._replace(size=cond.size)
        return guided(network, x_t, t, cond, uncond, self.guidance)

    def draw_step(self, keys: Sequence[Key], first: int = 0) -> int:
        """A move from `first` on, the same for the whole micro-batch; stream "stop"."""
        return int(self.draws.integers([keys[0]], first, len(self), stream="stop"))

    def transition(self, out: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor, keys: Sequence[Key]) -> Step:
        """The law of the move from t to t_next, all [B]: mean [B, C, h, w] and std [B, 1, 1, 1]."""
        clean = bool((t_next == self.schedule.t_clean).all())
        if self.law == "deterministic":
            return gaussian_step(self.schedule, out, x_t, t, t_next)
        if clean:  # the schedulers of these laws end at x0 itself, whatever the schedule calls clean
            x0, _ = self.schedule.split(out, x_t, t)
            return x0, torch.zeros_like(x0[:, :1, :1, :1])
        if self.law == "ancestral":
            return gaussian_step(self.schedule, out, x_t, t, t_next, eta=1.0)
        if self.law == "renoise":
            return renoise_step(self.schedule, out, x_t, t, t_next)
        eta = self.draws.uniform([(key, level) for key, level in zip(keys, t.tolist(), strict=True)], stream="eta")
        return renoise_step(self.schedule, out, x_t, t, t_next, per_sample(eta).to(x_t.device))

    def noising(self) -> Noising:
        """Training at the sampler's own timesteps and no others, with errors of the noise."""
        levels = tuple(self.timesteps.tolist())
        return Noising(self.schedule, self.draws, timesteps="grid", levels=levels, error_weight="epsilon")

    @torch.no_grad()
    def sample(self, network: Network, cond: Cond, keys: Sequence[Key], x: Tensor | None = None) -> Tensor:
        """Clean latents [B, C, h, w], without gradients."""
        return self.walk(network, cond, keys, x=x)[-1].x_next


def own_law(config: dict[str, Any]) -> Law:
    """The law of a pipeline's scheduler, from its config."""
    if config.get("stochastic_sampling"):
        return "renoise"
    return LAWS.get(config["_class_name"], "deterministic")  # type: ignore[return-value]


def own_timesteps(config: dict[str, Any], steps: int) -> Tensor:
    """The descending timesteps int64 [steps] that a pipeline's scheduler chooses. ValueError where it cannot."""
    scheduler: Any = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps)
    timesteps = torch.as_tensor(scheduler.timesteps).long()
    if len(timesteps) != steps:
        raise ValueError(f"{config['_class_name']} makes {len(timesteps)} steps of 'sampler.steps' = {steps}")
    return timesteps


def few_step_scheduler(config: dict[str, Any]) -> dict[str, Any]:
    """The scheduler config of a model distilled from the one with this config: LCM's, or a flow's that renoises."""
    if config["_class_name"].startswith("FlowMatch"):
        return {**config, "stochastic_sampling": True}
    return {**diffusers.LCMScheduler.from_config(config).config, "_class_name": "LCMScheduler"}
