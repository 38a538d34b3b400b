"""Where networks run and what they compute in: device, dtypes, autocast, memory format, attention, checkpointing, DDP.

No other file of diffalign decides these; torch.compile and sharding belong here too. Weights that train are float32,
and their matrix products are computed in `compute_dtype`. Weights that never train are kept in `frozen_dtype`. A
network carries its precision with it, whoever calls it. Losses, errors and log densities are not computed under
autocast; they are float32. Scorers are placed by `reward_models.placement`.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
"""Layers whose weights autocast casts at each use."""
Role = Literal["policy", "reference", "encoder", "decoder"]


class Placement(NamedTuple):
    """Where networks run and how. A run says the first two (`run.placement`), the section of a backbone the rest.

    device         of every network
    compute_dtype  of the matrix products of what trains and of its reference; None for that of the weights
    frozen_dtype   of the weights that never train
    lora           whether only a LoRA trains, so that the weights of the network itself never do
    attention      implementation of attention
    gradient_checkpointing  recompute activations in the backward pass
    """

    device: torch.device
    compute_dtype: torch.dtype | None = None
    frozen_dtype: torch.dtype = torch.float32
    lora: bool = False
    attention: Literal["sdpa", "xformers"] = "sdpa"
    gradient_checkpointing: bool = False

    def dtype(self, role: Role, *, overflows: bool = False) -> torch.dtype:
        """Of the weights of a network in this role. overflows: float16 has not the range for it, so it gets float32."""
        trains = role == "policy" and not self.lora
        return torch.float32 if trains or (overflows and self.frozen_dtype == torch.float16) else self.frozen_dtype


def placement_of(accelerator: Any) -> Placement:
    """The device and the mixed precision of accelerate."""
    return Placement(accelerator.device, DTYPES.get(accelerator.mixed_precision))


def place(network: Any, role: Role, where: Placement | None = None) -> Any:
    """The network in its place; returns what callers call.

    policy     a denoiser, before it gets a LoRA; the aux network of two players is placed so too
    reference  a frozen copy of a denoiser that is placed already, which computes the same bits; needs no `where`
    encoder    a text encoder, frozen
    decoder    an autoencoder, frozen; gradients may pass through it
    """
    if role == "reference":
        return _frozen_copy(network)
    assert where is not None
    network.to(where.device)
    if role == "policy":
        network.compute_dtype = where.compute_dtype
        if hasattr(network.network, "conv_in"):  # a U-Net
            network.network.to(memory_format=torch.channels_last)
        if where.attention == "xformers":
            network.network.enable_xformers_memory_efficient_attention()
    else:
        network.eval().requires_grad_(False)
    if where.gradient_checkpointing and role != "encoder":
        model = network.network if role == "policy" else network
        model.enable_gradient_checkpointing()  # diffusers checkpoints with use_reentrant=False
    return network


def prepare(module: nn.Module, accelerator: Any) -> nn.Module:
    """A network that trains, as accelerate wraps it: DDP on several processes, and its autocast, a scorer's only one.

    Call it after the reference is copied and before the optimizer is made. torch.compile and `fully_shard` go here.
    """
    return accelerator.prepare_model(module)


@contextmanager
def precision(network: nn.Module, device: torch.device) -> Iterator[None]:
    """The autocast of a placed denoiser: matrices in its `compute_dtype`, norms and softmax in float32.

    Weights that were cast are not kept: before torch 2.11 a copy made under no_grad served later calls that need a
    gradient.
    """
    dtype: Any = getattr(network, "compute_dtype", None)
    if dtype is None:
        yield
        return
    with torch.autocast(device.type, dtype=dtype, cache_enabled=False):
        yield


def as_input(network: Any, *tensors: Tensor) -> list[Tensor]:
    """Tensors in the dtype of a diffusers model's weights, which is what it takes."""
    dtype = network.dtype
    return [x.to(dtype) for x in tensors]


def _frozen_copy(module: nn.Module) -> nn.Module:
    """Matrices are kept in `compute_dtype`, as autocast would cast them: half the memory, and no cast at each call."""
    copied = copy.deepcopy(module).eval().requires_grad_(False)
    dtype: Any = getattr(module, "compute_dtype", None)
    for layer in copied.modules() if dtype is not None else ():
        if isinstance(layer, MATRICES):
            layer.to(dtype)
    return copied


def on_cpu(network: nn.Module) -> nn.Module:
    """The network in float32 on the CPU: its tensors moved one by one, and shared where they are so already."""
    memo: dict[int, Any] = {}  # deepcopy takes from it what it would copy
    for x in (*network.parameters(), *network.buffers()):
        moved = x.detach().to("cpu", torch.float32 if x.is_floating_point() else x.dtype)
        memo[id(x)] = nn.Parameter(moved, requires_grad=False) if isinstance(x, nn.Parameter) else moved
    return copy.deepcopy(network, memo).eval()


def freeze(module: nn.Module, dtype: torch.dtype) -> None:
    """Let nothing of a module train, and keep it in a dtype."""
    module.requires_grad_(False).to(dtype)


def trainable(module: nn.Module) -> None:
    """Let a module train, in float32."""
    module.requires_grad_(True).float()


# The state that trains. Checkpoints, the moving average, the export of adapters and the optimizer read and write it
# through these functions. With sharding, `whole` gathers a tensor and `fill` scatters one; the export of a whole
# network reads its `state_dict`, which a hook set by `prepare` can gather in the same way.


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a network that train, wrapped for several processes or not."""
    return [*_trained(module).values()]


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Their values by name, as files take them."""
    return {name: whole(p) for name, p in _trained(module).items()}


def load_trained_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set them. Raises ValueError where the state is of other parameters than train now."""
    here = _trained(module)
    if state.keys() != here.keys():
        raise ValueError(f"other weights than this run trains: {sorted(state.keys() ^ here.keys())[:3]}")
    for name, parameter in here.items():
        fill(parameter, state[name])


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    return {name: p for name, p in inner.named_parameters() if p.requires_grad}


def whole(x: Tensor) -> Tensor:
    """A tensor of a network or an optimizer as files take it."""
    return x.detach().contiguous()


@torch.no_grad()
def fill(x: Tensor, value: Tensor) -> None:
    """Set a tensor of a network or an optimizer to what a file holds."""
    x.copy_(value)


def has_xformers() -> bool:
    """Whether `attention` may be xformers here."""
    return importlib.util.find_spec("xformers") is not None and torch.cuda.is_available()


def free_memory(device: torch.device) -> None:
    """Give what networks that were dropped have left back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def deterministic_only() -> None:
    """Use algorithms that give the same bits each time, and no others: what has none raises RuntimeError and is named.

    Call it before the device is first used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS gives other bits with other workspaces
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
