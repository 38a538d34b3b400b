"""The hooks of recipes that train a denoiser, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from diffalign.algorithms.base import Algorithm
from diffalign.config import too_small
from diffalign.networks.ema import Ema
from diffalign.networks.families.base import Backbone
from diffalign.networks.sampler import Sampler
from diffalign.training.hooks.averaging import Averaging
from diffalign.training.hooks.checkpoint import Checkpoint, Stateful, check_checkpoints, in_order
from diffalign.training.hooks.export import Export, Verify
from diffalign.training.hooks.monitor import Monitor
from diffalign.training.hooks.samples import SampleGrid
from diffalign.training.run import Run
from diffalign.training.trainer import Hook


def standard_hooks(
    run: Run,
    backbone: Backbone,
    resolution: int,
    algorithm: Algorithm | None = None,
    sampler: Sampler | None = None,
    monitor: Monitor | None = None,
    own: Sequence[Hook] = (),
    *,
    checkpoint_every: int = 500,
    keep_checkpoints: int = 2,
    ema_decay: float | None = None,
    sample_every: int = 500,
    sample_prompts: tuple[str, ...] = (),
    sample_steps: int = 25,
    sample_guidance: float = 7.5,
    verify_export: bool = True,
) -> list[Hook]:
    """The hooks of every recipe that trains a backbone's denoiser; samples are `resolution` pixels wide and high.

    algorithm  whose state checkpoints hold, where it has one
    sampler    draws the sample grid, instead of DDIM by sample_steps and sample_guidance
    monitor    watches the run, and may stop it
    own        the recipe's own, after those that look at the run and before the checkpoint: what they change is saved,
               a step that they declare the last one as well, and at the end they may add to the export

    Args:
        checkpoint_every: steps between checkpoints (for resume); the last step always writes one; 0 for never
        keep_checkpoints: how many checkpoints to keep, the newest ones
        ema_decay: keep a moving average of the weights with this decay; samples and export use it
        sample_every: steps between sample grids; 0 for never
        sample_prompts: prompts of the sample grid, each with the same noise every time
        sample_steps: DDIM steps of the sample grid, in recipes without a sampler of their own
        sample_guidance: guidance scale of the sample grid, in the same recipes
        verify_export: load the export in a fresh process with plain diffusers and compare it with the run
    """
    ema = Ema(backbone.denoiser, ema_decay) if ema_decay is not None else None
    averaged = ema.applied if ema else nullcontext
    held: dict[str, Stateful] = {} if monitor is None else {"monitor": monitor}
    if algorithm is not None and type(algorithm).state is not Algorithm.state:
        held["algorithm"] = algorithm
    hooks: list[Hook] = [Averaging(ema)] if ema else []
    if monitor is not None:  # before what acts on the last step, which it may declare
        hooks.append(monitor)
    if sample_every and sample_prompts:
        if sampler is None:
            settings: dict[str, Any] = {"steps": sample_steps, "guidance": sample_guidance}
            sampler = Sampler(backbone, run.draws, resolution, law="deterministic", **settings)
        hooks.append(SampleGrid(run, backbone, averaged, sample_every, sample_prompts, sampler))
    hooks += [Export(run, backbone, averaged), *own]
    hooks = in_order(Checkpoint(run, ema, checkpoint_every, keep_checkpoints, held), hooks)
    return [*hooks, Verify(run, backbone, averaged, resolution)] if verify_export else hooks


def check_hooks(cfg: dict[str, Any]) -> list[str]:
    """What cannot work in a `hooks` section, one line each."""
    problems = check_checkpoints(cfg) + too_small("hooks", cfg, sample_every=0, sample_steps=1, sample_guidance=0)
    if cfg["ema_decay"] is not None and not 0 < cfg["ema_decay"] < 1:
        problems.append(f"'hooks.ema_decay' = {cfg['ema_decay']} must lie between 0 and 1, or be null")
    return problems


standard_hooks.check = check_hooks  # type: ignore[attr-defined]
