"""LoRA by peft on diffusers models: attach, find what trains, switch off for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def add_lora(network: Any, *, rank: int, alpha: float | None, targets: Sequence[str], seed: int) -> None:
    """Freeze a diffusers model and add a trainable float32 LoRA to the layers whose names end in one of `targets`.

    alpha defaults to rank. A is Gaussian and keyed by `seed`, B is zero, so the model does not change at first
    (Hu et al., 2021). Raises ValueError when no layer matches.
    """
    network.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,
            target_modules=list(targets),
            init_lora_weights="gaussian",
        )
        network.add_adapter(config)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def lora_layers(network: nn.Module) -> list[BaseTunerLayer]:
    """Every layer of the model that carries an adapter; empty for a model without LoRA."""
    return [m for m in network.modules() if isinstance(m, BaseTunerLayer)]


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """Run the model as it was before LoRA. Adapters are on again afterwards, whatever happens inside."""
    layers = lora_layers(network)
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
