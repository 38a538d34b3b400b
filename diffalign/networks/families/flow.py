"""Base class of the rectified-flow families SD3 and FLUX."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from diffalign.diffusion.schedule import FlowSchedule
from diffalign.networks.families.base import Backbone, Source


class FlowBackbone(Backbone):
    """A backbone with a transformer over patches that predicts the velocity of a rectified flow."""

    network_name = "transformer"
    schedule: FlowSchedule

    def __init__(self, source: Source):
        super().__init__(source)
        self.schedule = FlowSchedule()

    def _levels(self, steps: int, resolution: int, sigmas: list[float] | None = None) -> Tensor:
        """Noise levels [steps] of the pipeline's scheduler, shifted for images of this resolution.

        sigmas are the levels before the shift, by default the scheduler's.
        """
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler_config)
        config, mu = scheduler.config, None
        if config.use_dynamic_shifting:
            tokens = (self.latent_shape(resolution)[1] // self.patch) ** 2
            lengths = (config.base_image_seq_len, config.max_image_seq_len)
            mu = calculate_shift(tokens, *lengths, config.base_shift, config.max_shift)
        scheduler.set_timesteps(steps, sigmas=sigmas, mu=mu)
        return scheduler.sigmas[:-1].clone()
