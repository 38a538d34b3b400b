"""The frozen model that alignment must not stray from: a copy, or the same weights with the adapters off."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from diffalign.lora import adapters_off, lora_layers
from diffalign.types import Cond


class FrozenReference:
    """A frozen copy of a denoiser as it is now, in eval mode, never with a gradient."""

    def __init__(self, denoiser: nn.Module):
        self.denoiser = copy.deepcopy(denoiser).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Same arguments and result as the denoiser: [B, C, h, w], [B], cond -> [B, C, h, w]."""
        return self.denoiser(x_t, t, cond)


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
        with adapters_off(self.denoiser):
            return self.denoiser(x_t, t, cond)


def reference_for(denoiser: nn.Module) -> FrozenReference | AdapterOffReference:
    """Adapters off where the denoiser has a LoRA, else a frozen copy of it as it is now."""
    return AdapterOffReference(denoiser) if lora_layers(denoiser) else FrozenReference(denoiser)


Module = TypeVar("Module", bound=nn.Module)


def frozen(module: Module) -> Module:
    """The module in eval mode with no parameter asking for a gradient; inputs may still carry one."""
    return module.eval().requires_grad_(False)
