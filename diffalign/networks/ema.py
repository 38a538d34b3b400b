"""An exponential moving average of the weights that train, by diffusers' EMAModel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffalign.networks.placement import fill, trained_parameters, whole


class Ema:
    """The average of a network's trainable weights; warm-up as in diffusers, min(decay, (1 + step) / (10 + step))."""

    def __init__(self, network: nn.Module, decay: float):
        self.parameters = trained_parameters(network)
        self.model = EMAModel(self.parameters, decay=decay)

    def step(self) -> None:
        """Take in the weights as they are now; call once after each optimizer step."""
        self.model.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network holds the averaged weights; afterwards its own again."""
        self.model.store(self.parameters)
        self.model.copy_to(self.parameters)
        try:
            yield
        finally:
            self.model.restore(self.parameters)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by position, for safetensors."""
        return {str(i): whole(p) for i, p in enumerate(self.model.shadow_params)}

    def load(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Continue from `tensors()` as they were after `steps` optimizer steps."""
        for i, shadow in enumerate(self.model.shadow_params):
            fill(shadow, tensors[str(i)])
        self.model.optimization_step = steps
