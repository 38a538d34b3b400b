"""Precision: what a network computes in, whoever calls it.

Every network carries its own precision. Losses, errors and log densities are outside of all of this, in float32.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import nn

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
"""Layers whose weights autocast casts at each use."""


class Placement(NamedTuple):
    """Where networks run, and the dtype that autocast runs their matrices in; None for the weights' own."""

    device: torch.device
    autocast_dtype: torch.dtype | None = None


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Matrices in `dtype`, norms and softmax in float32; nothing changes where it is None.

    Weights that were cast are not kept: before torch 2.11 a copy made under no_grad served later calls that need a
    gradient.
    """
    if dtype is None:
        yield
        return
    with torch.autocast(device.type, dtype=dtype, cache_enabled=False):
        yield


def deterministic_only() -> None:
    """Use algorithms that give the same bits each time, and no others: what has none raises RuntimeError and is named.

    Call it before the device is first used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS gives other bits with other workspaces
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


Module = TypeVar("Module", bound=nn.Module)


def frozen_copy(module: Module, dtype: torch.dtype | None) -> Module:
    """A copy in eval mode, without gradients, that computes under `autocast(dtype)` to the bit what the module does.

    Matrices are kept in `dtype`, as autocast would cast them: half the memory, and no cast at each call.
    """
    copied = copy.deepcopy(module).eval().requires_grad_(False)
    if dtype is not None:
        for layer in copied.modules():
            if isinstance(layer, MATRICES):
                layer.to(dtype)
    return copied
