"""Hooks that export the model at the end of a run and verify the export."""

from __future__ import annotations

from typing import Any

from diffalign.networks.export import export
from diffalign.networks.families.base import Backbone
from diffalign.networks.sharding import gathered
from diffalign.networks.verify import verify
from diffalign.training.run import Run
from diffalign.training.trainer import Hook, Trainer


class Export(Hook):
    """Writes `export/` in diffusers layout at the end of the run."""

    def __init__(self, run: Run, backbone: Backbone, averaged: Any, trigger: str | None = None):
        self.run, self.backbone, self.averaged, self.trigger = run, backbone, averaged, trigger

    def end(self, trainer: Trainer) -> None:
        with self.averaged(), gathered(self.backbone.denoiser):
            if self.run.main:
                self.run.print(export(self.backbone, self.run.folder / "export", self.trigger))
        self.run.accelerator.wait_for_everyone()


class Verify(Hook):
    """Last hook: compares the export with the trained model, on rank 0. The other ranks do not wait."""

    def __init__(self, run: Run, backbone: Backbone, averaged: Any, resolution: int):
        self.run, self.backbone, self.averaged, self.resolution = run, backbone, averaged, resolution

    def end(self, trainer: Trainer) -> None:
        with self.averaged(), gathered(self.backbone.denoiser):
            if self.run.main:
                self.run.print(verify(self.backbone, self.run.folder / "export", self.resolution))
