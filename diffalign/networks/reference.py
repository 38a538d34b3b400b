"""Frozen reference model of the policy: a copy, or the same weights with the LoRA disabled."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from diffalign.networks.lora import adapters_off, lora_layers
from diffalign.networks.placement import place, trained_parameters
from diffalign.networks.sharding import replicated, squared_distance
from diffalign.types import Cond


class FrozenReference:
    """Frozen copy of the policy's current weights: eval mode, no gradients, the same precision."""

    def __init__(self, denoiser: nn.Module):
        self.denoiser = place(denoiser, "reference")

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Same arguments and result as the denoiser: [B, C, h, w], [B], cond -> [B, C, h, w]."""
        return self.denoiser(x_t, t, cond)

    def using(self) -> AbstractContextManager[None]:
        """A context manager that does nothing: `denoiser` always is the reference."""
        return nullcontext()


class AdapterOffReference:
    """The policy with its LoRA disabled, as the frozen reference. Needs no second network in memory.

    Call it before or after the policy's forward and backward, never between a forward and the recomputation of gradient
    checkpointing. The LoRA is enabled again after every call.
    """

    def __init__(self, denoiser: nn.Module):
        self.denoiser, self.layers = denoiser, lora_layers(denoiser)

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Same arguments and result as the denoiser: [B, C, h, w], [B], cond -> [B, C, h, w]."""
        with self.using():
            return self.denoiser(x_t, t, cond)

    def using(self) -> AbstractContextManager[None]:
        """A context manager that disables the LoRA, so that `denoiser` is the reference; inputs may need gradients."""
        return adapters_off(self.layers)


def reference_for(denoiser: nn.Module) -> FrozenReference | AdapterOffReference:
    """The reference of a denoiser: AdapterOffReference if it has a LoRA, else a frozen copy."""
    return AdapterOffReference(denoiser) if lora_layers(denoiser) else FrozenReference(denoiser)


class DistanceToStart:
    """Differentiable squared distance of the trainable weights from their initial values, |theta - theta_start|^2.

    For a LoRA it is the exact norm of the weight change, (alpha / rank)^2 |B A|^2, computed from r x r matrices. Weight
    decay on A and B is not equivalent. For a whole network it keeps a copy of the initial weights.
    """

    def __init__(self, module: nn.Module):
        self.layers = lora_layers(module)
        self.parameters = [] if self.layers else trained_parameters(module)
        self.start = [p.detach().clone() for p in self.parameters]

    def __call__(self) -> Tensor:
        """The squared distance, a scalar."""
        if not self.layers:
            return squared_distance(self.parameters, self.start)
        terms = []
        for layer in self.layers:
            name = layer.active_adapters[0]
            down, up = replicated(layer.lora_A[name].weight), replicated(layer.lora_B[name].weight)
            terms.append(layer.scaling[name] ** 2 * ((down @ down.T) * (up.T @ up)).sum())
        return torch.stack(terms).sum()
