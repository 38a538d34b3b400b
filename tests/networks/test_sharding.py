"""Sharded denoisers: outputs, gradients, clipping, files and exports equal those of a network that is not sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.networks.sharding import Sharding, check_launch, shard

COMPARE = """
import os, sys
import torch
import torch.distributed as dist
from diffalign.networks.ema import Ema
from diffalign.networks.loading import load_backbone
from diffalign.networks.placement import Placement, load_trained_state, prepare, trained, trained_parameters
from diffalign.networks.reference import DistanceToStart, FrozenReference
from diffalign.networks.sharding import Sharding, clip_gradients, gathered, like, local, shard, whole
from torch.distributed.tensor import DTensor

path, rank, dtype, compute = sys.argv[1], int(sys.argv[2]), sys.argv[3], {"bf16": torch.bfloat16}.get(sys.argv[4])
dist.init_process_group("gloo")
here, world = dist.get_rank(), dist.get_world_size()
how = Sharding("cpu", compute)
g = torch.Generator().manual_seed(0)


def step(dtype, compute, sharding):
    where = Placement(torch.device("cpu"), compute, sharding=sharding)
    backbone = load_backbone(where, path=path, lora_rank=rank, dtype=dtype, max_sequence_length=8)
    denoiser = backbone.denoiser
    with torch.no_grad():
        for k, (name, p) in enumerate(trained(denoiser).items()):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
    if sharding is None:
        denoiser.network.to(memory_format=torch.contiguous_format)
    reference = FrozenReference(denoiser) if not rank else None
    if sharding is not None:
        shard(denoiser, sharding)
    x = torch.randn(2 * world, *backbone.latent_shape(32), generator=g.manual_seed(0))
    cond = backbone.encode_text(["small red circle on white", "large blue square on black"] * world)
    mine = torch.arange(2 * here, 2 * here + 2) if sharding is not None else torch.arange(2 * world)
    levels = backbone.schedule.at(torch.tensor([0.5, 0.3] * world))
    out = denoiser(x[mine], levels[mine], cond.at(mine))
    if reference is not None:
        assert torch.equal(reference(x[mine], levels[mine], cond.at(mine)), out), "the reference equals the policy"
    distance = DistanceToStart(denoiser)
    for p in distance.start:
        local(p).sub_(0.01)
    ((out - 1).square().mean() + distance()).backward()
    return denoiser, out.detach()


def gradients(denoiser):
    return [whole(p.grad) for p in trained_parameters(denoiser)]


def distance(a, b):
    a, b = (torch.cat([x.flatten() for x in xs]) for xs in (a, b))
    return ((a - b).norm() / b.norm()).item()


denoiser, out = step(dtype, compute, how)
plain, expected = step(dtype, compute, None)
exact = plain if (dtype, compute) == ("fp32", None) else step("fp32", None, None)[0]
assert all(isinstance(p, DTensor) for p in denoiser.parameters())
local_size = sum(local(p).numel() for p in denoiser.parameters())
held = int(os.environ["LOCAL_WORLD_SIZE"])
assert local_size < 0.75 * sum(p.numel() for p in plain.parameters()) or held == 1
torch.testing.assert_close(out, expected[2 * here : 2 * here + 2], atol=1e-5 if compute is None else 0.05, rtol=0)
mine, theirs, best = gradients(denoiser), gradients(plain), gradients(exact)
if here == 0:
    rounding = distance(theirs, best)  # of half precision: the sharded gradient may err as much
    assert distance(mine, best) < 1e-5 + 1.3 * rounding, (distance(mine, best), rounding)
norm = clip_gradients(trained_parameters(denoiser), 1e-3, None)
clipped = torch.nn.utils.clip_grad_norm_(trained_parameters(plain), 1e-3)
torch.testing.assert_close(norm, clipped, rtol=1e-5 if compute is None and dtype == "fp32" else 0.05, atol=0)
mine = gradients(denoiser)
assert here or distance(mine, gradients(plain)) < (1e-4 if compute is None and dtype == "fp32" else 0.1)

values = {k: torch.randn(p.shape, generator=g) for k, p in trained(denoiser).items()}
load_trained_state(denoiser, values)
averages = Ema(denoiser, 0.5).tensors()
for k, (name, p) in enumerate(trained(denoiser).items()):
    back, again, average = whole(p), whole(like(p, values[name])), whole(averages[str(k)])
    assert here or torch.equal(back, values[name]) and torch.equal(again, back) and torch.equal(average, back)
before = {name: p for name, p in denoiser.named_parameters()}
with gathered(denoiser):
    state = denoiser.network.state_dict()
    assert not any(isinstance(x, DTensor) for x in state.values())
    assert here or all(torch.equal(state[k.removeprefix("network.")], v) for k, v in values.items())
assert all(p is before[name] for name, p in denoiser.named_parameters())
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("family", "rank", "dtype", "compute", "processes", "nodes"),
    [
        ("tiny_sd", 0, "fp32", "no", 2, 1),
        ("tiny_sd", 2, "bf16", "bf16", 2, 1),
        ("tiny_sd3", 0, "fp32", "bf16", 4, 2),
        ("tiny_sdxl", 2, "fp32", "no", 2, 2),
        ("tiny_flux", 2, "bf16", "no", 2, 1),
    ],
)
def test_a_sharded_denoiser_equals_one_that_is_not(
    request: pytest.FixtureRequest,
    forks: Any,
    family: str,
    rank: int,
    dtype: str,
    compute: str,
    processes: int,
    nodes: int,
) -> None:
    """Output, gradient, clipping, loading, EMA, gathering; float32 LoRAs over a half-precision base; several nodes."""
    code = f"import os\nos.environ['LOCAL_WORLD_SIZE'] = '{processes // nodes}'\n{COMPARE}"
    arguments = [str(request.getfixturevalue(family)), str(rank), dtype, compute]
    done = forks.run(code, *arguments, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


@pytest.mark.parametrize(
    ("environment", "precision", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, None, "DeepSpeed is not supported; use FSDP2 .*reshard_after_forward"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, None, "Megatron-LM is not supported; use FSDP2"),
        (FSDP | {"FSDP_VERSION": "1"}, None, "FSDP 1 is not supported; set fsdp_version: 2"),
        (FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "True"}, None, "cpu_ram_efficient_loading: true .* set it to false"),
        (
            FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            None,
            r"set it to false and backbone\.gradient_checkpointing",
        ),
        (FSDP, "fp16", "fp16 does not work with FSDP2; use bf16"),
        (FSDP | {"ACCELERATE_MIXED_PRECISION": "fp16"}, None, "fp16 does not work with FSDP2; use bf16"),
    ],
)
def test_launches_that_do_not_work_are_refused(environment: dict[str, str], precision: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_launch(environment, precision)


def test_launches_that_work_are_not_refused() -> None:
    check_launch(FSDP, "bf16")
    check_launch(FSDP | {"ACCELERATE_MIXED_PRECISION": "fp16"}, "no")
    check_launch({"ACCELERATE_MIXED_PRECISION": "fp16"}, None)


def test_only_denoisers_are_sharded() -> None:
    with pytest.raises(ValueError, match=r"FSDP2 shards denoisers .* and Linear is none; train it with DDP"):
        shard(torch.nn.Linear(2, 2), Sharding("cpu", None))


@pytest.mark.parametrize("setting", [{"compile": "whole"}, {"cuda_graphs": True}, {"quantize": "int8"}])
def test_settings_that_shards_cannot_have_are_refused(tiny_sd: Path, setting: Any) -> None:
    from diffalign.networks.loading import load_backbone
    from diffalign.networks.placement import Placement

    where = Placement(torch.device("cpu"), sharding=Sharding("cpu", None))
    with pytest.raises(ValueError, match=rf"'backbone\.{next(iter(setting))}'.* does not work with FSDP2"):
        load_backbone(where, path=str(tiny_sd), lora_rank=2, **setting)
