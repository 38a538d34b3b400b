"""Frozen linear layers in 8 or 4 bits, as the base of a LoRA (QLoRA, Dettmers et al., 2023).

Their own forward and backward pass, since those of the libraries do not suit training here. bitsandbytes' layers
compute with other kernels where no gradient is needed, so that the reference would differ from the policy at the start.
torchao's keep the dequantised weights of every layer for the backward pass.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["int8", "nf4"]
BLOCK = 64
"""Weights with a common scale in nf4."""


def quantize_linear(network: nn.Module, kind: Kind, device: torch.device) -> None:
    """Quantise the linear layers of a network's repeated blocks on a device, one after the other.

    The layers outside of them (embeddings of time and text, the output) and convolutions stay as they are.
    """
    for stack in (m for m in network.modules() if isinstance(m, nn.ModuleList)):
        for parent in stack.modules():
            for name, layer in parent.named_children():
                if type(layer) is nn.Linear:
                    setattr(parent, name, QuantizedLinear(layer, kind, device))


def quantized(network: nn.Module) -> set[str]:
    """Names of the quantised layers of a network."""
    return {name for name, layer in network.named_modules() if isinstance(layer, QuantizedLinear)}


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with weights in 8 bits (a scale for each output) or in nf4 (a scale for 64 weights).

    weight  int8 [out, in], or uint8 with two weights a byte
    scale   float32
    """

    def __init__(self, layer: nn.Linear, kind: Kind, device: torch.device):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.dtype, weight = layer.weight.dtype, layer.weight.detach().to(device)
        if kind == "int8":
            scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            stored = (weight.float() / scale).round().to(torch.int8)
        else:
            importlib.import_module("bitsandbytes")  # registers the operators
            stored, scale = torch.ops.bitsandbytes.quantize_4bit(weight, BLOCK, "nf4", torch.uint8)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = layer.bias

    def dequantized(self) -> Tensor:
        """The weights [out, in] in the layer's original dtype."""
        return _dequantized(self.weight, self.scale, (self.out_features, self.in_features), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], with the weights of `dequantized`."""
        return _Linear.apply(x, self.weight, self.scale, self.bias, self.out_features, self.dtype)


class _Linear(torch.autograd.Function):
    """Linear layer that dequantises its weights in the forward pass, and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor, outputs: int, dtype: Any) -> Tensor:
        ctx.save_for_backward(stored, scale)
        ctx.settings = (outputs, x.shape[-1]), dtype
        return F.linear(x, _dequantized(stored, scale, *ctx.settings), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:  # type: ignore[override]
        stored, scale = ctx.saved_tensors
        weight = _dequantized(stored, scale, *ctx.settings)
        return gradient @ weight.to(gradient.dtype), None, None, None, None, None


def _dequantized(stored: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if stored.dtype == torch.int8:
        return (stored * scale).to(dtype)
    return torch.ops.bitsandbytes.dequantize_4bit(stored, scale, BLOCK, "nf4", shape, dtype)
