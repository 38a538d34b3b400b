"""The frozen model that alignment must not stray from: a copy, or the same weights with the adapters off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from diffalign.networks.lora import adapters_off, lora_layers
from diffalign.networks.placement import place, trained_parameters
from diffalign.types import Cond


class FrozenReference:
    """A frozen copy of a denoiser as it is now: eval mode, no gradients, the same precision."""

    def __init__(self, denoiser: nn.Module):
        self.denoiser = place(denoiser, "reference")

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Same arguments and result as the denoiser: [B, C, h, w], [B], cond -> [B, C, h, w]."""
        return self.denoiser(x_t, t, cond)

    def using(self) -> AbstractContextManager[None]:
        """Nothing has to change for `denoiser` to be the reference."""
        return nullcontext()


class AdapterOffReference:
    """The denoiser itself with its LoRA off: no second network in memory.

    Call it before the policy's forward or after it, but never between a forward and the recomputation of gradient
    checkpointing; every call leaves the adapters on.
    """

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Same arguments and result as the denoiser: [B, C, h, w], [B], cond -> [B, C, h, w]."""
        with self.using():
            return self.denoiser(x_t, t, cond)

    def using(self) -> AbstractContextManager[None]:
        """Inside, `denoiser` is the reference, for gradients in its input as well."""
        return adapters_off(self.denoiser)


def reference_for(denoiser: nn.Module) -> FrozenReference | AdapterOffReference:
    """Adapters off where the denoiser has a LoRA, else a frozen copy of it as it is now."""
    return AdapterOffReference(denoiser) if lora_layers(denoiser) else FrozenReference(denoiser)


class DistanceToStart:
    """|theta - theta_start|^2 of the weights that train, differentiable.

    Of a LoRA it is that of the change it makes, (alpha / rank)^2 |B A|^2, exactly, from r x r matrices; decay of A and
    B themselves is not the same. Of a whole network it needs a copy of the weights as they are now.
    """

    def __init__(self, module: nn.Module):
        self.layers = lora_layers(module)
        self.parameters = [] if self.layers else trained_parameters(module)
        self.start = [p.detach().clone() for p in self.parameters]

    def __call__(self) -> Tensor:
        """A scalar."""
        if not self.layers:
            return torch.stack(
                [(p - p0).square().sum() for p, p0 in zip(self.parameters, self.start, strict=True)]
            ).sum()
        terms = []
        for layer in self.layers:
            name = layer.active_adapters[0]
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            terms.append(layer.scaling[name] ** 2 * ((down @ down.T) * (up.T @ up)).sum())
        return torch.stack(terms).sum()
