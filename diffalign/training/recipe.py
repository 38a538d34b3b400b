"""Code shared by the recipes in train/: it builds the parts of an algorithm and trains them.

`cfg.make("sampler", ...)` calls the factory that the recipe passed to `config.parse` as `sampler=`, with the keys of
that config section.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from diffalign.algorithms.base import Algorithm
from diffalign.algorithms.denoising import Denoising
from diffalign.config import Config
from diffalign.data.loader import KeyedDataset
from diffalign.diffusion.noising import Noising
from diffalign.diffusion.steps import Network
from diffalign.networks.families.base import Backbone
from diffalign.networks.reference import reference_for
from diffalign.networks.sampler import Sampler
from diffalign.networks.sharding import is_sharded
from diffalign.objectives.rewards import Rewards
from diffalign.training import memory
from diffalign.training.optim import Player
from diffalign.training.remembering import remember_reference
from diffalign.training.run import Run
from diffalign.training.trainer import Hook
from diffalign.types import Cond


def begin(cfg: Config) -> tuple[Run, Backbone]:
    """Create the run and load the model to train, in the precision of the run."""
    run = cfg.make("run", cfg)
    return run, cfg.make("backbone", run.placement)


class Parts:
    """Parts of a recipe that trains a denoiser, on images or on its own samples.

    Positional: the configuration, the run, the backbone, the data set, and a function that makes the frozen reference
    of a denoiser (None for methods without a reference).

    sampler    the model's sampler                        in recipes with the section `sampler`
    rewards    rewards of the mixture of scorers          in recipes with the section `reward`
    noising    timesteps, noise and loss weights          in recipes with the section `noising`
    reference  frozen copy of the initial denoiser; None for methods without a reference
    policy     trainable denoiser, prepared for several processes
    """

    sampler: Sampler
    rewards: Rewards
    noising: Noising

    def __init__(
        self,
        cfg: Config,
        run: Run,
        backbone: Backbone,
        data: KeyedDataset,
        reference: Callable[[nn.Module], Network] | None = reference_for,
    ):
        self.cfg, self.run, self.backbone, self.data = cfg, run, backbone, data
        self.resolution = cfg.data["resolution"]
        size = (cfg.data.get("height") or self.resolution, cfg.data.get("width") or self.resolution)
        if "sampler" in cfg:
            self.sampler = cfg.make("sampler", backbone, run.draws, size)
        if "reward" in cfg:
            self.rewards = Rewards(cfg.make("reward", run.device), backbone.decode, run.gather)
        if "noising" in cfg:
            self.noising = cfg.make("noising", backbone.schedule, run.draws)
        self.reference = reference(backbone.denoiser) if reference else None  # before accelerate wraps the denoiser
        self.policy = run.prepare(backbone.denoiser)

    @property
    def dims(self) -> int:
        """Number of values in one latent."""
        return math.prod(self.backbone.latent_shape(self.resolution))

    @property
    def empty(self) -> Cond:
        """The Cond of the empty prompt, batch axis 1."""
        return self.backbone.encode_text([""])

    def fit(self, algorithm: Algorithm, hooks: Sequence[Hook] = ()) -> None:
        """Train to the end of the run. hooks: additional hooks of the recipe; order: see `standard_hooks`."""
        cfg, run, backbone, sampler = self.cfg, self.run, self.backbone, getattr(self, "sampler", None)
        check_even_passes(algorithm)
        players, monitor = players_of(cfg, algorithm), None
        if "monitor" in cfg:
            monitor = cfg.make("monitor", run, backbone, sampler, self.rewards, cfg.factories["reward"])
        every = cfg.make("hooks", run, backbone, self.resolution, algorithm, sampler, monitor, hooks)
        backbone.release()  # latents and text are encoded: no text encoder in memory while training
        loader = run.loader(self.data)
        if self.data.draws_per_sample and isinstance(algorithm, Denoising) and algorithm.remembers_reference:
            remember_reference(cfg, run, algorithm, loader, backbone.latent_shape(self.resolution))
        parts = memory.held(algorithm, players, averaged=cfg.hooks.get("ema_decay") is not None)
        run.print(memory.described(parts, run.folder / "config.yaml"))
        self.reference = None  # the algorithm holds the only reference left, and may free it
        cfg.make("trainer", run, algorithm, players, every).fit(loader)


def check_even_passes(algorithm: Algorithm) -> None:
    """Raise ValueError if networks are sharded and the ranks would run different numbers of forward passes."""
    if not algorithm.even_passes and any(is_sharded(module) for module in algorithm.players.values()):
        raise ValueError(
            f"{type(algorithm).__name__} with these settings runs different numbers of forward passes on each process, "
            "and FSDP2 needs equal ones; train it with DDP: configs/accelerate/eight_gpus.yaml"
        )


def players_of(cfg: Config, algorithm: Algorithm) -> Mapping[str, Player]:
    """The algorithm's networks with their optimizers, from the section `<player>_optimizer` or else `optimizer`."""
    sections = {name: f"{name}_optimizer" for name in algorithm.players}
    return {
        name: cfg.make(sections[name] if sections[name] in cfg else "optimizer", module)
        for name, module in algorithm.players.items()
    }


def fit_scorer(
    cfg: Config,
    run: Run,
    scorer: Any,
    algorithm: Algorithm,
    data: KeyedDataset,
    validation: Any,
    hooks: Sequence[Hook] = (),
) -> None:
    """Train a scorer to the end of the run, with validation on `validation`.

    hooks: additional hooks of this recipe; the factory of its `hooks` section documents their order.
    """
    players = players_of(cfg, algorithm)
    every = cfg.make("hooks", run, scorer, validation, hooks)
    cfg.make("trainer", run, algorithm, players, every).fit(run.loader(data))
