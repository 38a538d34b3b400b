"""Base class of the U-Net families Stable Diffusion and SDXL."""

from __future__ import annotations

from typing import Any

from diffusers import DDIMScheduler
from torch import Tensor

from diffalign.diffusion.schedule import VPSchedule
from diffalign.networks.families.base import Backbone, Source
from diffalign.types import Size


class UNetBackbone(Backbone):
    """A backbone with a U-Net that predicts eps or v on a variance-preserving schedule."""

    network_name = "unet"
    schedule: VPSchedule

    def __init__(self, source: Source):
        super().__init__(source)
        self.schedule = VPSchedule.from_config(self.scheduler_config)

    def grid(self, steps: int, size: int | Size) -> Tensor:
        config: Any = DDIMScheduler.from_config(self.scheduler_config).config
        return self.schedule.grid(steps, config["timestep_spacing"], config["steps_offset"])
