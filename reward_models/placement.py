"""Device and precision of scorers. No other file of this package decides them.

Networks of diffusion models are placed by `diffalign.networks.placement`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_device(name: str | torch.device) -> torch.device:
    """The torch device of a name; `auto` is a GPU if available, else the CPU. Raises ValueError for unknown devices."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be auto, cpu, cuda, cuda:1, ...; got '{name}'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name} needs a GPU, but torch finds none; use cpu")
    return device


def place(scorer: nn.Module, device: torch.device, dtype: str, *, compile: bool = False) -> None:
    """Freeze a scorer on the device, with its network in a dtype of DTYPES.

    A scorer can define `cast(dtype)` to convert its network, and `compile()` to compile its slow parts.
    """
    if dtype != "fp32":
        cast: Any = getattr(scorer, "cast", scorer.to)
        cast(DTYPES[dtype])
    scorer.to(device).eval().requires_grad_(False)
    if compile:
        scorer.compile()


def as_input(network: nn.Module, x: Tensor) -> Tensor:
    """A tensor converted to the device and dtype of a network's weights."""
    weight = next(network.parameters())
    return x.to(weight.device, weight.dtype)


def full_precision(device: torch.device) -> torch.autocast:
    """Context without autocast: heads and scores are float32, independent of the caller."""
    return torch.autocast(device.type, enabled=False)
