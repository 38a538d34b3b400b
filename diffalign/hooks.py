"""What happens beside the steps, in its order: moving average, monitor, sample grids, checkpoints, the export."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.algorithms.base import Algorithm
from diffalign.backbones import Backbone
from diffalign.checkpoint_files import check_checksums, load_trained, save_trained, write_checksums
from diffalign.config import too_small
from diffalign.ema import Ema
from diffalign.export import export, verify
from diffalign.run import Run
from diffalign.sample_grid import SampleGrid
from diffalign.sampler import Sampler
from diffalign.trainer import Hook, Trainer
from reward_models.files import readable


class Stateful(Protocol):
    """Has something that a checkpoint must hold besides the players' weights."""

    def state(self) -> dict[str, Tensor]: ...
    def load(self, state: Mapping[str, Tensor]) -> None: ...


class Watching(Hook, Stateful, Protocol):
    """A hook with a memory: the monitor."""


def standard_hooks(
    run: Run,
    backbone: Backbone,
    resolution: int,
    algorithm: Algorithm | None = None,
    sampler: Sampler | None = None,
    monitor: Watching | None = None,
    package: Hook | None = None,
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
    package    what a recipe adds to the export

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
    parts = {"algorithm": algorithm, "monitor": monitor}
    held = {name: part for name, part in parts.items() if part is not None}
    hooks: list[Hook] = [Averaging(ema)] if ema else []
    if monitor is not None:  # before what acts on the last step, which it may declare
        hooks.append(monitor)
    if sample_every and sample_prompts:
        if sampler is None:
            settings: dict[str, Any] = {"steps": sample_steps, "guidance": sample_guidance}
            sampler = Sampler(backbone, run.draws, resolution, law="deterministic", **settings)
        hooks.append(SampleGrid(run, backbone, averaged, sample_every, sample_prompts, sampler))
    hooks.append(Export(run, backbone, averaged))
    if package is not None:
        hooks.append(package)
    hooks = in_order(Checkpoint(run, ema, checkpoint_every, keep_checkpoints, held), hooks)
    return [*hooks, Verify(run, backbone, averaged, resolution)] if verify_export else hooks


def in_order(checkpoint: Checkpoint, hooks: Sequence[Hook]) -> list[Hook]:
    """Restored before any other hook looks at the run; saved after all of them have, so that a kill between loses
    nothing of theirs, and a step that one of them declares the last is saved as well."""
    return [Restore(checkpoint), *hooks, checkpoint]


def check_checkpoints(cfg: dict[str, Any]) -> list[str]:
    """What cannot work in the keys about checkpoints of a `hooks` section, one line each."""
    return too_small("hooks", cfg, checkpoint_every=0, keep_checkpoints=1)


def check_hooks(cfg: dict[str, Any]) -> list[str]:
    """What cannot work in a `hooks` section, one line each."""
    problems = check_checkpoints(cfg) + too_small("hooks", cfg, sample_every=0, sample_steps=1, sample_guidance=0)
    if cfg["ema_decay"] is not None and not 0 < cfg["ema_decay"] < 1:
        problems.append(f"'hooks.ema_decay' = {cfg['ema_decay']} must lie between 0 and 1, or be null")
    return problems


standard_hooks.check = check_hooks  # type: ignore[attr-defined]


class _Hook:
    def start(self, trainer: Trainer) -> None:
        pass

    def after_step(self, trainer: Trainer) -> None:
        pass

    def end(self, trainer: Trainer) -> None:
        pass


class Averaging(_Hook):
    """Feeds the moving average; must come before the hooks that use it."""

    def __init__(self, ema: Ema):
        self.ema = ema

    def after_step(self, trainer: Trainer) -> None:
        self.ema.step()


class Checkpoint(_Hook):
    """Saves what resume needs, every so many steps (0 for never) and at the last one, and loads it.

    A checkpoint is written beside its final place and renamed when complete, so the newest one is always whole.
    Only weights that train are in it. parts: whose state it holds besides, by name. The digests of its files are in it,
    and what a disk has damaged is refused.
    """

    def __init__(self, run: Run, ema: Ema | None, every: int, keep: int, parts: Mapping[str, Stateful] | None = None):
        self.run, self.ema, self.every, self.keep, self.parts = run, ema, every, keep, parts or {}
        self.folder = run.folder / "checkpoints"
        run.accelerator.register_save_state_pre_hook(save_trained)
        run.accelerator.register_load_state_pre_hook(load_trained)

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if (p / "state.json").exists() and p.suffix != ".tmp")

    def restore(self, trainer: Trainer) -> None:
        """Go on from the newest checkpoint of a run that resumes. Raises ValueError where that cannot be done."""
        if self.run.main:
            for unfinished in self.folder.glob("step-*.tmp"):  # of a kill while it was written
                shutil.rmtree(unfinished)
        found = self.complete() if self.run.resume else []
        if not found:
            self.run.rewind(-1)  # nothing that was logged, not even before the first step
            return
        path = found[-1]
        try:
            if self.run.main:
                check_checksums(path)
            self.run.accelerator.load_state(str(path))
            state = json.loads((path / "state.json").read_text())
            if self.ema:
                self.ema.load(load_file(path / "ema.safetensors"), state["step"])
            for name, part in self.parts.items():
                part.load(load_file(path / f"{name}.safetensors"))
            trainer.step, used, turn = state["step"], state["micro_batches"], state["micro_batches_a_turn"]
        except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
            cure = f"to resume from '{found[-2].name}', the one before" if found[1:] else "and begin again at step 0"
            raise ValueError(f"checkpoint '{path}' cannot be read ({error}); delete that folder {cure}") from error
        trainer.micro = self._position(trainer, used, turn)
        self.run.rewind(trainer.step)
        self.run.print(f"resumed from '{path}'")

    def _position(self, trainer: Trainer, used: int, turn: int) -> int:
        """Micro-batches that each process of this run has behind it, of those used so far by all processes together.

        Raises ValueError where a turn would be another number of micro-batches than it was: another batch.
        """
        world = self.run.accelerator.num_processes
        if world * trainer.grad_accum != turn:
            cure = f"set 'trainer.grad_accum' to {turn // world}"
            raise ValueError(
                f"'{self.run.folder}' accumulated {turn} micro-batches over all processes, now it would be "
                f"{trainer.grad_accum} on each of {world}; "
                + (f"resume on a number of processes that divides {turn}" if turn % world else cure)
            )
        return used // world

    def after_step(self, trainer: Trainer) -> None:
        if self.every and (trainer.step % self.every == 0 or trainer.last or trainer.interrupted):
            self.save(trainer)
        if trainer.interrupted:
            none = "no checkpoint is written, for 'hooks.checkpoint_every' is 0"
            self.run.print(f"step {trainer.step} is saved; run.resume=true goes on from there" if self.every else none)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint of this moment. Every rank calls it. Raises OSError when it cannot be written."""
        self.run.flush()
        final = self.folder / f"step-{trainer.step:06d}"
        temporary = final.with_suffix(".tmp")
        if self.run.main:
            shutil.rmtree(temporary, ignore_errors=True)
        self.run.accelerator.wait_for_everyone()
        try:
            self._write(trainer, temporary)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has three names
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(
                f"cannot write checkpoint '{final}' ({error}); make room and go on with run.resume=true, "
                "the checkpoints before it are whole"
            ) from error
        if self.run.main:
            shutil.rmtree(final, ignore_errors=True)
            readable(temporary)
            os.replace(temporary, final)
            for old in self.complete()[: -self.keep]:
                shutil.rmtree(old)
        self.run.accelerator.wait_for_everyone()

    def _write(self, trainer: Trainer, folder: Path) -> None:
        self.run.accelerator.save_state(str(folder))
        if self.run.main:
            if self.ema:
                save_file(self.ema.tensors(), folder / "ema.safetensors")
            for name, part in self.parts.items():
                save_file(part.state(), folder / f"{name}.safetensors")
            world = self.run.accelerator.num_processes  # of a resumed run it may be another
            state = {"step": trainer.step, "micro_batches": trainer.micro * world}
            state["micro_batches_a_turn"] = trainer.grad_accum * world
            (folder / "state.json").write_text(json.dumps(state))
        self.run.accelerator.wait_for_everyone()
        if self.run.main:
            write_checksums(folder)


class Restore(_Hook):
    """The first hook: loads the newest checkpoint of a run that resumes, so that all others find the run as it was."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def start(self, trainer: Trainer) -> None:
        self.checkpoint.restore(trainer)


class Export(_Hook):
    """At the end: `export/` in diffusers layout."""

    def __init__(self, run: Run, backbone: Backbone, averaged: Any):
        self.run, self.backbone, self.averaged = run, backbone, averaged

    def end(self, trainer: Trainer) -> None:
        if self.run.main:
            with self.averaged():
                self.run.print(export(self.backbone, self.run.folder / "export"))
        self.run.accelerator.wait_for_everyone()


class Verify(_Hook):
    """The last hook: holds what was exported against the run. The other processes do not wait for it."""

    def __init__(self, run: Run, backbone: Backbone, averaged: Any, resolution: int):
        self.run, self.backbone, self.averaged, self.resolution = run, backbone, averaged, resolution

    def end(self, trainer: Trainer) -> None:
        if self.run.main:
            with self.averaged():
                self.run.print(verify(self.backbone, self.run.folder / "export", self.resolution))
