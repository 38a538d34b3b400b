"""What happens beside the steps: moving average, checkpoints, sample grids, the export."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.utils import save_image

from diffalign.algorithms.base import Algorithm
from diffalign.backbones import Backbone
from diffalign.config import too_small
from diffalign.ema import Ema
from diffalign.export import export
from diffalign.run import Run
from diffalign.sampler import Sampler
from diffalign.trainer import Hook, Trainer
from reward_models.files import readable, writing


def standard_hooks(
    run: Run,
    backbone: Backbone,
    resolution: int,
    algorithm: Algorithm | None = None,
    sampler: Sampler | None = None,
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

    Args:
        checkpoint_every: steps between checkpoints (for resume); the last step always writes one; 0 for never
        keep_checkpoints: how many checkpoints to keep, the newest ones
        ema_decay: keep a moving average of the weights with this decay; samples and export use it
        sample_every: steps between sample grids; 0 for never
        sample_prompts: prompts of the sample grid, each with the same noise every time
        sample_steps: DDIM steps of the sample grid, in recipes without a sampler of their own
        sample_guidance: guidance scale of the sample grid, in the same recipes
        verify_export: load the export in a fresh process with plain diffusers and compare its output
    """
    ema = Ema(backbone.denoiser, ema_decay) if ema_decay is not None else None
    averaged = ema.applied if ema else nullcontext
    hooks: list[Hook] = [Averaging(ema)] if ema else []
    if checkpoint_every:
        hooks.append(Checkpoint(run, ema, checkpoint_every, keep_checkpoints, algorithm))
    if sample_every and sample_prompts:
        if sampler is None:
            settings: dict[str, Any] = {"steps": sample_steps, "guidance": sample_guidance}
            sampler = Sampler(backbone, run.draws, resolution, law="deterministic", **settings)
        hooks.append(SampleGrid(run, backbone, averaged, sample_every, sample_prompts, sampler))
    return [*hooks, Export(run, backbone, averaged, resolution, verify_export)]


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
    """Saves what resume needs, every so many steps, and loads it when the run resumes.

    A checkpoint is written beside its final place and renamed when complete, so the newest one is always whole.
    Only weights that train are in it.
    """

    def __init__(self, run: Run, ema: Ema | None, every: int, keep: int, algorithm: Algorithm | None = None):
        self.run, self.ema, self.every, self.keep, self.algorithm = run, ema, every, keep, algorithm
        self.folder = run.folder / "checkpoints"
        run.accelerator.register_save_state_pre_hook(_save_trained)
        run.accelerator.register_load_state_pre_hook(_load_trained)

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if (p / "state.json").exists() and p.suffix != ".tmp")

    def start(self, trainer: Trainer) -> None:
        found = self.complete()
        if not self.run.resume or not found:
            self.run.rewind(0)
            return
        path = found[-1]
        try:
            self.run.accelerator.load_state(str(path))
            state = json.loads((path / "state.json").read_text())
            if self.ema:
                self.ema.load(load_file(path / "ema.safetensors"), state["step"])
            if self.algorithm and (path / "algorithm.safetensors").exists():
                self.algorithm.load(load_file(path / "algorithm.safetensors"))
        except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"checkpoint '{path}' cannot be read ({error}); delete that folder to resume from the one before"
            ) from error
        trainer.step, trainer.micro = state["step"], state["micro"]
        self.run.rewind(trainer.step)
        self.run.print(f"resumed from '{path}'")

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step % self.every == 0 or trainer.step == trainer.steps:
            self.save(trainer)

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
        self.run.accelerator.wait_for_everyone()
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
            if self.algorithm and (state := self.algorithm.state()):
                save_file(state, folder / "algorithm.safetensors")
            (folder / "state.json").write_text(json.dumps({"step": trainer.step, "micro": trainer.micro}))


def _save_trained(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
    """Replace accelerate's full state dicts by the weights that train. Engines that shard save by themselves."""
    if not weights:
        return
    for i, model in enumerate(models):
        trained = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
        save_file(trained, Path(folder) / f"trained_{i}.safetensors")
    weights.clear()


def _load_trained(models: list[nn.Module], folder: str) -> None:
    files = sorted(Path(folder).glob("trained_*.safetensors"))
    for model, file in zip(models, files, strict=bool(files)):
        saved, here = load_file(file), {n: p for n, p in model.named_parameters() if p.requires_grad}
        if saved.keys() != here.keys():
            raise ValueError(
                f"'{file}' holds other weights than this run trains: {sorted(saved.keys() ^ here.keys())[:3]}"
            )
        with torch.no_grad():
            for name, parameter in here.items():
                parameter.copy_(saved[name])
    if files:
        models.clear()


class SampleGrid(_Hook):
    """Draws the same prompts from the same noise every so many steps, step 0 first: `samples/step-000500.png`."""

    def __init__(
        self, run: Run, backbone: Backbone, averaged: Any, every: int, prompts: Sequence[str], sampler: Sampler
    ):
        self.run, self.backbone, self.averaged = run, backbone, averaged
        self.every, self.prompts, self.sampler = every, prompts, sampler
        self.cond = backbone.encode_text(prompts)
        self.columns = max(1, round(len(prompts) ** 0.5))

    def start(self, trainer: Trainer) -> None:
        if trainer.step == 0:
            self.draw(0)

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step % self.every == 0 or trainer.step == trainer.steps:
            self.draw(trainer.step)

    @torch.no_grad()
    def draw(self, step: int) -> None:
        if self.run.main:
            with self.averaged(), self.run.accelerator.autocast():
                latents = self.sampler.sample(self.backbone.denoiser, self.cond, self.prompts)
            folder = self.run.folder / "samples"
            folder.mkdir(exist_ok=True)
            file = folder / f"step-{step:06d}.png"
            with writing(file):
                save_image(self.backbone.decode(latents), file, nrow=self.columns, padding=1)
            self.backbone.release()
        self.run.accelerator.wait_for_everyone()


class Export(_Hook):
    """At the end: `export/` in diffusers layout, verified in a fresh process."""

    def __init__(self, run: Run, backbone: Backbone, averaged: Any, resolution: int, verify: bool):
        self.run, self.backbone, self.averaged = run, backbone, averaged
        self.resolution, self.verify = resolution, verify

    def end(self, trainer: Trainer) -> None:
        if self.run.main:
            with self.averaged():
                message = export(self.backbone, self.run.folder / "export", self.resolution, verify=self.verify)
            self.run.print(message)
        self.run.accelerator.wait_for_everyone()
