"""Exponential moving average (EMA) of the trainable weights, based on diffusers' EMAModel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffalign.networks.placement import trained_parameters
from diffalign.networks.sharding import as_shard, fill, local


class Ema:
    """EMA of a network's trainable weights; decay warm-up as in diffusers, min(decay, (1 + step) / (10 + step)).

    Of a sharded network each process averages its own rows.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.sharded = trained_parameters(network)
        self.parameters = [local(p).requires_grad_() for p in self.sharded]
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
        """The averaged tensors, named by position, sharded as the weights are."""
        pairs = zip(self.sharded, self.model.shadow_params, strict=True)
        return {str(i): as_shard(p, shadow) for i, (p, shadow) in enumerate(pairs)}

    def load(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Restore `tensors()` saved after `steps` optimizer steps."""
        for name, shadow in self.tensors().items():
            fill(shadow, tensors[name])
        self.model.optimization_step = steps
