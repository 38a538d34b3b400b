"""`backbone.quantize`: the error of the weights, the reference at the start, gradients, memory, exports, resuming."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

from diffalign.config import parameters
from diffalign.networks import compilation
from diffalign.networks.export import export
from diffalign.networks.families.base import Backbone
from diffalign.networks.loading import check_backbone, load_backbone
from diffalign.networks.placement import Placement, trained_parameters
from diffalign.networks.quantization import QuantizedLinear, quantized
from diffalign.networks.reference import reference_for
from diffalign.networks.verify import verify
from diffalign.types import Cond

KINDS = ("int8", "nf4")
FAMILIES = ["tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_precision() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def layers(kind: Any, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, QuantizedLinear]:
    torch.manual_seed(0)
    layer = nn.Linear(128, 96).to(dtype)
    nn.init.normal_(layer.weight)
    return layer, QuantizedLinear(layer, kind, CPU)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.0062), ("nf4", 0.094)])
def test_the_error_of_normal_weights(kind: str, error: float) -> None:
    """int8: rounding to absmax / 127, absmax of 128 normal numbers about 2.7: 2.7 / 127 / sqrt(12). nf4: 9 to 10 %."""
    layer, stored = layers(kind)
    found = (stored.dequantized() - layer.weight).norm() / layer.weight.norm()
    assert found.item() == pytest.approx(error, rel=0.05)
    size = sum(p.nbytes for p in (stored.weight, stored.scale))
    assert size == {"int8": 96 * 128 + 96 * 4, "nf4": 96 * 128 // 2 + 96 * 128 // 64 * 4}[kind]


def test_nf4_is_that_of_bitsandbytes() -> None:
    bnb = importlib.import_module("bitsandbytes")
    layer, stored = layers("nf4")
    packed, state = bnb.functional.quantize_4bit(layer.weight.detach(), blocksize=64, quant_type="nf4")
    assert torch.equal(bnb.functional.dequantize_4bit(packed, state), stored.dequantized())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_layer_is_a_linear_layer_with_rounded_weights(kind: str, dtype: torch.dtype) -> None:
    """Output and gradient of its input, in training and evaluation, with a gradient and without."""
    layer, stored = layers(kind, dtype)
    x = torch.randn(4, 5, 128, dtype=dtype, requires_grad=True)
    expected = linear(x, stored.dequantized(), layer.bias)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    for module in (stored.train(), stored.eval()):
        out = module(x)
        assert torch.equal(out, expected) and torch.equal(module(x.detach()), expected)
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], gradient)
    assert not any(p.requires_grad for p in (stored.weight, stored.scale))


def inputs(backbone: Backbone) -> tuple[Tensor, Tensor, Cond]:
    g = torch.Generator().manual_seed(0)
    cond = backbone.encode_text(["small red circle on white", "large blue square on black"])
    if type(backbone).__name__ == "SDXL":
        cond = cond._replace(size=torch.full((2, 6), 32.0))
    return torch.randn(2, *backbone.latent_shape(32), generator=g), torch.tensor([700, 100]), cond


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_policy_at_the_start(family: str, kind: Any, request: pytest.FixtureRequest) -> None:
    """Bit for bit, in bf16 with gradient checkpointing: the policy with a graph, the reference without."""
    path = str(request.getfixturevalue(family))
    settings: dict[str, Any] = {"lora_rank": 2, "quantize": kind, "dtype": "bf16", "max_sequence_length": 8}
    backbone = load_backbone(Placement(CPU, torch.bfloat16), path=path, gradient_checkpointing=True, **settings)
    stored = quantized(backbone.denoiser.network)
    assert any("to_q" in name for name in stored) and not any(name.count(".") < 2 for name in stored)
    given = inputs(backbone)
    backbone.denoiser.train()
    out, reference = backbone.denoiser(*given), reference_for(backbone.denoiser)
    assert out.requires_grad and torch.equal(out.detach(), reference(*given))
    out.square().mean().backward()
    weights = trained_parameters(backbone.denoiser)
    assert all(".lora_" in n for n, p in backbone.denoiser.named_parameters() if p.requires_grad)
    moved = [p.grad is not None and bool(p.grad.any()) for p in weights]
    assert sum(moved) == len(weights) // 2  # B is 0, so A has no gradient yet


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_compute_the_same(kind: Any, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured, and run as they are."""
    monkeypatch.setattr(compilation, "COMPILER", {"dynamic": False, "backend": "aot_eager"})
    found: list[list[Tensor]] = []
    for how in ("off", "blocks"):
        backbone = load_backbone(CPU, path=str(tiny_sd), lora_rank=2, quantize=kind, compile=how)  # type: ignore[arg-type]
        out = backbone.denoiser(*inputs(backbone))
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad for p in trained_parameters(backbone.denoiser) if p.grad is not None)])
    torch._dynamo.reset()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_no_dequantised_weights_are_kept_for_the_backward_pass() -> None:
    """A linear layer would keep its weights; these keep the few bits, which are in memory anyway."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    for kind in KINDS:
        _, stored = layers(kind)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            stored(torch.randn(4, 128, requires_grad=True))
        assert {x.data_ptr() for x in kept} == {stored.weight.data_ptr(), stored.scale.data_ptr()}
        kept.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_is_a_lora_for_the_unquantised_model(kind: Any, tiny_sd: Path, tmp_path: Path) -> None:
    """It holds LoRA weights only, stock diffusers loads it, and its verification compares them."""
    backbone = load_backbone(CPU, path=str(tiny_sd), lora_rank=2, lora_alpha=6.0, quantize=kind)
    with torch.no_grad():
        for p in trained_parameters(backbone.denoiser):
            p += 0.1
    export(backbone, tmp_path / "export")
    said = verify(backbone, tmp_path / "export", 32)
    count = len(backbone.denoiser.network.state_dict()) - 2 * len(quantized(backbone.denoiser.network))  # weight, scale
    assert f"verified in a fresh process: stock diffusers loads the same {count} tensors" in said
    (file,) = (tmp_path / "export").glob("pytorch*.safetensors")
    with safe_open(file, "pt") as content:
        assert all(".lora_" in name for name in content.keys())  # noqa: SIM118
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipeline.load_lora_weights(str(tmp_path / "export"), weight_name=file.name, adapter_name="default")
    theirs, ours = dict(pipeline.unet.named_parameters()), dict(backbone.denoiser.network.named_parameters())
    names = [name for name in ours if ".lora_" in name]
    assert names and all(torch.equal(theirs[name], ours[name]) for name in names)
    with torch.no_grad():
        next(p for n, p in backbone.denoiser.named_parameters() if p.requires_grad).add_(1)
    assert "could NOT be verified: 1 of" in verify(backbone, tmp_path / "export", 32)


def test_settings_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = {name: default for name, (_, default) in parameters(load_backbone).items()} | {"quantize": "nf4"}
    assert not check_backbone({**fine, "lora_rank": 4})
    (problem,) = check_backbone(fine)
    assert "'backbone.quantize' = nf4 needs a LoRA" in problem
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    (problem,) = check_backbone({**fine, "lora_rank": 4})
    assert "needs the package bitsandbytes: pip install 'diffalign[quantization]'" in problem
    assert not check_backbone({**fine, "lora_rank": 4, "quantize": "int8"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_at_ln_2_and_resumes_bit_for_bit(
    kind: str, tmp_path: Path, pairs_file: Path, tiny_sd: Path, recipe: Callable
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = ["--config=playground", f"data.path={pairs_file}", f"backbone.path={tiny_sd}", f"backbone.quantize={kind}"]
    words += ["data.batch_size=4", "trainer.steps=4", "hooks.checkpoint_every=2", "hooks.sample_every=2"]
    words += ["run.mixed_precision=bf16", "backbone.dtype=bf16", "run.log_every=1", "optimizer.lr_warmup_steps=0"]
    words += ["hooks.sample_prompts=[small red circle on white]", "hooks.sample_steps=1", "algorithm.beta=5000"]
    recipe("diffusion_dpo", *words, f"run.folder={whole}")
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "export")
    shutil.rmtree(broken / "checkpoints" / "step-000004")
    recipe("diffusion_dpo", *words, f"run.folder={broken}", "run.resume=true")
    rows = [[json.loads(line) for line in (x / "metrics.jsonl").read_text().splitlines()] for x in (whole, broken)]
    for row in rows[0] + rows[1]:
        row.pop("perf/samples_per_second")
    assert len(rows[0]) == 4 and rows[0] == rows[1]
    assert rows[0][0]["policy/loss"] == pytest.approx(0.69314718, abs=1e-6)
    one, other = (load_file(x / "checkpoints/step-000004/trained_0.safetensors") for x in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(".lora_" in name for name in one)
    assert json.loads((whole / "export" / "verify.json").read_text())["verified"]
