"""Checkpoints: written every so many steps, and restored when a run resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.config import too_small
from diffalign.networks.ema import Ema
from diffalign.training.checkpoint_files import check_checksums, load_trained, save_trained, write_checksums
from diffalign.training.run import Run
from diffalign.training.trainer import Hook, Trainer
from reward_models.files import put_folder, readable


class Stateful(Protocol):
    """Has something that a checkpoint must hold besides the players' weights."""

    def state(self) -> dict[str, Tensor]: ...
    def load(self, state: Mapping[str, Tensor]) -> None: ...


class Checkpoint(Hook):
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
            self.run.metrics.rewind(-1)  # nothing that was logged, not even before the first step
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
        self.run.metrics.rewind(trainer.step)
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
        self.run.metrics.flush()
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
            readable(temporary)
            put_folder(temporary, final)
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


class Restore(Hook):
    """The first hook: loads the newest checkpoint of a run that resumes, so that all others find the run as it was."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def start(self, trainer: Trainer) -> None:
        self.checkpoint.restore(trainer)


def in_order(checkpoint: Checkpoint, hooks: Sequence[Hook]) -> list[Hook]:
    """Restored before any other hook looks at the run; saved after all of them have, so that a kill between loses
    nothing of theirs, and a step that one of them declares the last is saved as well."""
    return [Restore(checkpoint), *hooks, checkpoint]


def check_checkpoints(cfg: dict[str, Any]) -> list[str]:
    """What cannot work in the keys about checkpoints of a `hooks` section, one line each."""
    return too_small("hooks", cfg, checkpoint_every=0, keep_checkpoints=1)
