"""LoRA by peft on diffusers models: attach, switch off or to another one for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from diffalign.draws import seeded
from diffalign.networks.placement import trainable

GENERATOR = "default"
"""peft's name of the first adapter, the one that is exported."""


def add_lora(
    network: Any, *, rank: int, alpha: float | None, targets: Sequence[str], seed: int, name: str = GENERATOR
) -> None:
    """Freeze a diffusers model and add a trainable float32 LoRA to the layers whose names end in one of `targets`.

    alpha defaults to rank. A is Gaussian and keyed by `seed`, B is zero, so the model does not change at first
    (Hu et al., 2021). A second LoRA needs another name, and an Adapter for each. ValueError when no layer matches.
    """
    network.requires_grad_(False)
    with seeded(seed):
        config = LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,
            target_modules=list(targets),
            init_lora_weights="gaussian",
        )
        network.add_adapter(config, adapter_name=name)
    for layer in lora_layers(network):
        for parameters in (layer.lora_A, layer.lora_B):
            trainable(parameters)  # of every adapter: adding one freezes those before it


def lora_layers(network: nn.Module) -> list[BaseTunerLayer]:
    """Every layer of the model that carries an adapter; empty for a model without LoRA."""
    return [m for m in network.modules() if isinstance(m, BaseTunerLayer)]


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """Run the model as it was before LoRA. Adapters are on again afterwards, whatever happens inside."""
    layers = lora_layers(network)
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in trained:  # peft unfreezes only those of the adapter that is active
            parameter.requires_grad_(True)


class Adapter(nn.Module):
    """One of several LoRAs on a shared denoiser as a network of its own: its parameters are those of that LoRA.

    A backward pass recomputes checkpointed activations with the LoRA that is active then: differentiate inside `using`,
    or call `activate` before a loss is left to others to differentiate.
    """

    def __init__(self, denoiser: Any, name: str):
        super().__init__()
        self.denoiser, self.name = denoiser, name
        # DistributedDataParallel waits for the gradients of all others otherwise.
        everything = [n for n, _ in super().named_parameters()]
        self._ddp_params_and_buffers_to_ignore = [n for n in everything if not self._mine(n)]

    @property
    def network(self) -> Any:
        """The diffusers model."""
        return self.denoiser.network

    def _mine(self, parameter: str) -> bool:
        return f".{self.name}." in parameter

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in super().named_parameters(*args, **kwargs) if self._mine(n))

    def activate(self) -> str:
        """Switch the denoiser to this LoRA, leaving every one trainable; returns the name of the one before."""
        return _switch(self.denoiser, self.name)

    @contextmanager
    def using(self) -> Iterator[None]:
        """Inside, the denoiser has this LoRA; afterwards the one before."""
        before = self.activate()
        try:
            yield
        finally:
            _switch(self.denoiser, before)

    def forward(self, *inputs: Any) -> Any:
        """As the denoiser's, with this LoRA."""
        with self.using():
            return self.denoiser(*inputs)


def _switch(network: nn.Module, name: str) -> str:
    before = name
    for layer in lora_layers(network):
        before = layer.active_adapters[0]
        if before != name:
            trained = [p for p in layer.parameters() if p.requires_grad]
            layer.set_adapter(name)  # which freezes the others
            for parameter in trained:
                parameter.requires_grad_(True)
    return before
