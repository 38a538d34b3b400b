"""Sharding of networks over processes with torch's FSDP2: weights, gradients, optimizer state and EMA.

`placement` decides when: `place` shards frozen copies, `prepare` shards what trains. A sharded network keeps its class
methods and names; outside its forward and backward passes its parameters are DTensors, of which each process holds its
rows. All processes must run its forward passes equally often, because each pass gathers the weights of one block after
another.

A unit is a block that the model declares as indivisible; the rest is one more unit. FSDP2 wants one dtype for the
trainable parameters of a unit only, so float32 LoRAs and a frozen half-precision base can share units.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard


class Sharding(NamedTuple):
    """How the networks of a run are sharded.

    device         kind of the device: cuda, cpu, ...
    compute_dtype  dtype in which weights are gathered; None for their own
    reshard        free gathered weights after the forward pass; false is ZeRO-2: faster, with whole weights in memory
    offload        keep frozen copies of networks in the memory of the host
    """

    device: str
    compute_dtype: torch.dtype | None
    reshard: bool = True
    offload: bool = False


def check_launch(environment: Mapping[str, str], mixed_precision: str | None) -> None:
    """Raise ValueError if the settings of `accelerate launch` ask for a sharding that does not work."""
    asked = {name.upper() for name, value in environment.items() if value.lower() == "true"}
    problem = ""
    if "ACCELERATE_USE_DEEPSPEED" in asked:
        problem = (
            "DeepSpeed is not supported; use FSDP2 (configs/accelerate/eight_gpus_fsdp.yaml), with "
            "fsdp_reshard_after_forward: false in place of ZeRO-2"
        )
    elif "ACCELERATE_USE_MEGATRON_LM" in asked:
        problem = "Megatron-LM is not supported; use FSDP2 (configs/accelerate/eight_gpus_fsdp.yaml)"
    elif "ACCELERATE_USE_FSDP" not in asked:
        return
    elif environment.get("FSDP_VERSION") != "2":
        problem = "FSDP 1 is not supported; set fsdp_version: 2 in the accelerate config (accelerate 1.6 or later)"
    elif "FSDP_CPU_RAM_EFFICIENT_LOADING" in asked:
        problem = (
            "fsdp_cpu_ram_efficient_loading: true would leave text encoders without weights on all processes but one; "
            "set it to false in the accelerate config"
        )
    elif "FSDP_ACTIVATION_CHECKPOINTING" in asked:
        problem = "fsdp_activation_checkpointing is not supported; set it to false and backbone.gradient_checkpointing"
    elif "fp16" in (mixed_precision, mixed_precision or environment.get("ACCELERATE_MIXED_PRECISION")):
        problem = "'run.mixed_precision' = fp16 does not work with FSDP2; use bf16"
    if problem:
        raise ValueError(problem)


def sharding_of(device: torch.device, compute_dtype: torch.dtype | None) -> Sharding | None:
    """The sharding that `accelerate launch` was asked for; None without FSDP2 and without several processes."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if not (asked and dist.is_available() and dist.is_initialized()):
        return None
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    return Sharding(device.type, compute_dtype, reshard, os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true")


def shard(module: Any, how: Sharding) -> None:
    """Shard a denoiser in place, and move it to its device. Does nothing if it is sharded.

    Raises ValueError if the network is not a denoiser, or if it declares no blocks.
    """
    module = holder(module)
    if isinstance(module, FSDPModule):
        return
    model = getattr(module, "network", None)
    names = {*(getattr(model, "_no_split_modules", None) or ()), *(getattr(model, "_repeated_blocks", None) or ())}
    if model is None or not names:
        raise ValueError(
            f"FSDP2 shards denoisers with declared blocks, and {type(model or module).__name__} is none; train it with "
            "DDP: configs/accelerate/eight_gpus.yaml"
        )
    frozen = not any(p.requires_grad for p in module.parameters())
    options: dict[str, Any] = {
        "mesh": _mesh(how.device),
        "reshard_after_forward": how.reshard,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=how.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy(how.device != "cpu") if how.offload and frozen else OffloadPolicy(),
    }
    for part in reversed(list(module.modules())):  # inner blocks before those around them
        if type(part).__name__ in names or part is module:
            fully_shard(part, **options)
            if how.device == "cpu":  # gloo cannot average: before torch 2.9 it returned the sum
                part.set_force_sum_reduction_for_comms(True)
    module.register_forward_hook(_reshard_without_gradients)


def _reshard_without_gradients(module: nn.Module, inputs: Any, output: Any) -> None:
    """Free all gathered weights when no backward pass follows: they would hide changes of the parameters."""
    if not torch.is_grad_enabled():
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


@cache
def _mesh(device: str) -> DeviceMesh:
    """Processes as a mesh: with several nodes, weights are sharded within a node and replicated across nodes."""
    world = dist.get_world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if here == world:
        return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (world // here, here), mesh_dim_names=("replicate", "shard"))


def holder(module: Any) -> Any:
    """The module that is sharded: the denoiser that an Adapter shares, or else the module itself."""
    return getattr(module, "denoiser", module)


def is_sharded(module: Any) -> bool:
    """Whether a network is sharded, so that all processes must run its forward passes."""
    return isinstance(holder(module), FSDPModule)


@contextmanager
def accumulating(module: Any, accelerator: Any) -> Iterator[None]:
    """Context manager for all micro-batches of an optimizer step but the last: gradients are not reduced.

    Gradients of a whole sharded network are reduced nevertheless: until then each process would hold all of them.
    """
    inner = holder(module)
    if not isinstance(inner, FSDPModule):
        with accelerator.no_sync(module):
            yield
        return
    waits = any(not p.requires_grad for p in inner.parameters())  # type: ignore[attr-defined]
    inner.set_requires_gradient_sync(not waits)
    try:
        yield
    finally:
        inner.set_requires_gradient_sync(True)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float, accelerator: Any) -> Tensor:
    """Clip the gradients to a total norm over all shards. Returns the norm before, a scalar.

    Of DTensors torch would plan and look up each operation over all of them: seconds at first, then some at each step.
    """
    if not isinstance(parameters[0], DTensor):
        return accelerator.clip_grad_norm_(parameters, max_norm).detach()
    rows = [local(p.grad) for p in parameters if p.grad is not None]
    total = nn.utils.get_total_norm(rows).float().square()
    dist.all_reduce(total, group=parameters[0].device_mesh.get_group("shard"))
    norm = total.sqrt()
    torch._foreach_mul_(rows, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def replicated(x: Tensor) -> Tensor:
    """The full tensor of a sharded parameter on every process, differentiable."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def squared_distance(parameters: Sequence[Tensor], start: Sequence[Tensor]) -> Tensor:
    """Sum of squared differences over all rows of all processes, a scalar, differentiable in the parameters."""
    rows = [(p.to_local() if isinstance(p, DTensor) else p, local(p0)) for p, p0 in zip(parameters, start, strict=True)]
    own = torch.stack([(p.float() - p0.float()).square().sum() for p, p0 in rows]).sum()
    if not isinstance(parameters[0], DTensor):
        return own
    total = own.detach().clone()
    dist.all_reduce(total, group=parameters[0].device_mesh.get_group("shard"))
    return total + (own - own.detach())  # the gradient of the rows of this process


def whole(x: Tensor) -> Tensor:
    """The full, contiguous, detached tensor of a parameter or optimizer state, for a file.

    All processes call it. Of a sharded tensor, rank 0 gets the values on the host, the others a meta tensor.
    """
    if not isinstance(x, DTensor):
        return x.detach().contiguous()
    return cast(DTensor, x.detach()).full_tensor().to("meta" if dist.get_rank() else "cpu").contiguous()


@torch.no_grad()
def fill(x: Tensor, value: Tensor) -> None:
    """Copy a full tensor from a file into a parameter or optimizer state."""
    if value.shape != x.shape:
        raise ValueError(f"expected a tensor of shape {[*x.shape]}, got {[*value.shape]}")
    local(x).copy_(_rows(x, value))


def like(x: Tensor, value: Tensor) -> Tensor:
    """A full tensor from a file, on the device of a parameter; sharded and laid out as it is, if it has its shape.

    Fused optimizers pair the values of a parameter and its state by their place in memory: both are channels-last.
    """
    if value.shape != x.shape:
        return value.to(x.device, copy=True)
    return as_shard(x, torch.empty_like(local(x).detach(), dtype=value.dtype).copy_(_rows(x, value)))


def local(x: Tensor) -> Tensor:
    """The rows that this process holds, sharing memory; the tensor itself if it is not sharded."""
    return cast(DTensor, x.detach()).to_local() if isinstance(x, DTensor) else x


def as_shard(x: Tensor, rows: Tensor) -> Tensor:
    """The tensor that is sharded as `x` is and of which this process holds `rows`, sharing memory."""
    if not isinstance(x, DTensor):
        return rows
    return DTensor.from_local(rows, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())


def _rows(x: Tensor, value: Tensor) -> Tensor:
    """The rows of a full tensor that this process holds of `x`."""
    if isinstance(x, DTensor):
        for k, kind in enumerate(x.placements):
            if isinstance(kind, Shard):
                parts, rank = value.chunk(x.device_mesh.size(k), kind.dim), x.device_mesh.get_local_rank(k)
                value = parts[rank] if rank < len(parts) else value.narrow(kind.dim, 0, 0)
    return value


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Context manager in which a sharded network holds full tensors on the host of rank 0, to be exported.

    All processes enter it. It cannot run forward passes then.
    """
    places = [(part._parameters, name, p) for part in module.modules() for name, p in part._parameters.items()]
    places = [place for place in places if isinstance(place[2], DTensor)]
    for owner, name, p in places:
        assert p is not None
        owner[name] = nn.Parameter(whole(p), requires_grad=p.requires_grad)
    try:
        yield
    finally:
        for owner, name, p in places:
            owner[name] = p
