"""Exponential moving average (EMA) of the trainable weights, based on diffusers' EMAModel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffalign.networks.placement import fill, trained_parameters, whole


class Ema:
    """EMA of a network's trainable weights; decay warm-up as in diffusers, min(decay, (1 + step) / (10 + step))."""

    def __init__(self, network: nn.Module, decay: float):
        self.parameters = trained_parameters(network)
        self.model = EMAModel([p.float() for p in self.parameters], decay=decay, foreach=True)

    def step(self) -> None:
        """Update the average with the current weights; call once after each optimizer step."""
        self.model.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager that swaps the averaged weights into the network and restores its own weights on exit."""
        self.model.store(self.parameters)
        self.model.copy_to(self.parameters)
        try:
            yield
        finally:
            self.model.restore(self.parameters)

    def tensors(self) -> dict[str, Tensor]:
        """The averaged tensors, named by position, for a safetensors file."""
        return {str(i): whole(p) for i, p in enumerate(self.model.shadow_params)}

    def load(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Restore `tensors()` saved after `steps` optimizer steps."""
        for i, shadow in enumerate(self.model.shadow_params):
            fill(shadow, tensors[str(i)])
        self.model.optimization_step = steps
