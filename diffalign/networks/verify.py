"""Verification of an export: load it with stock diffusers in a fresh process and compare it with the run's weights."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.draws import seeded
from diffalign.networks.export import kept_parts, kind_of
from diffalign.networks.families.base import Backbone
from diffalign.networks.lora import GENERATOR
from diffalign.networks.placement import on_cpu
from diffalign.networks.quantization import quantized
from diffalign.networks.sharding import is_sharded, whole
from diffalign.networks.user_adapter import user_width
from diffalign.types import Cond
from reward_models.files import write_whole

VERIFY_STEPS = 4
VERIFY_PIXELS = 256
VERIFY_SECONDS = 1800
MAX_PARAMETERS_TO_SAMPLE = 4_000_000_000
"""Largest network (16 GB in float32) for which a sample image is compared too. For larger ones only tensors are."""
TOLERANCE = 1e-4
DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables of a launcher that the fresh process must not inherit."""

FRESH = '''
"""Script of the fresh process. It cannot import diffalign, and loads no text encoders: embeddings are given."""
import hashlib, json, sys
from pathlib import Path
sys.modules["diffalign"] = None
try:
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, the system ends this process, not the run
except OSError:
    pass
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
request = json.loads(sys.argv[1])
dtypes = {name: getattr(torch, dtype) for name, dtype in request["dtypes"].items()}
pipeline = DiffusionPipeline.from_pretrained(request["base"], torch_dtype=dtypes, **dict.fromkeys(request["left_out"]))
if request["draws"]:
    pipeline = pipeline.to(torch.float32)
if request["kind"] == "LoRA":
    weights = {"weight_name": "pytorch_lora_weights.safetensors", "adapter_name": "default"}
    pipeline.load_lora_weights(request["folder"], **weights)
if request["kind"] == "user adapter":
    adapter = {"subfolder": "", "weight_name": "user_adapter.safetensors", "image_encoder_folder": None}
    pipeline.load_ip_adapter(request["folder"], **adapter)
network = getattr(pipeline, request["network"])
tensors = {}
for name, value in network.state_dict().items():
    data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    tensors[name] = [str(value.dtype).removeprefix("torch."), hashlib.blake2b(data, digest_size=16).hexdigest()]
layers = {name: module for name, module in network.named_modules() if "default" in getattr(module, "lora_A", ())}
scales = {name: layer.scaling["default"] for name, layer in layers.items()}
Path(request["found"]).write_text(json.dumps({"tensors": tensors, "scales": scales}))
if request["draws"]:
    given = load_file(request["given"])
    if "user" in given:
        given["ip_adapter_image_embeds"] = [given.pop("user")]
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    fixed = torch.Generator().manual_seed(0)
    images = pipeline(**given, **request["settings"], generator=fixed, output_type="pt").images
    save_file({"images": images.contiguous()}, request["images"])
'''


def verify(backbone: Backbone, folder: Path, resolution: int) -> str:
    """Compare an export with the denoiser's current weights, write verify.json into it, and return a summary line.

    All tensors must be equal. For networks that are not too large a sample image (up to 256 pixels) must match too.
    Quantised weights are left out, since the fresh process loads the original ones.
    Never raises: the run is finished and its export stays valid if the verification itself fails.
    """
    found: dict[str, Any] = {"verified": False}
    try:
        found |= compare(backbone, folder, resolution)
        found["verified"] = not found["differs"]
        problem = "; ".join(found["differs"])
    except Exception as error:  # out of memory, disk full, killed process, loading error of a library
        problem = found["error"] = f"{type(error).__name__}: {error}"
    try:
        write_whole(folder / "verify.json", json.dumps(found, indent=2) + "\n")
    except OSError as error:
        problem += f"; '{folder / 'verify.json'}' cannot be written: {error}"
    if not found["verified"]:
        return f"WARNING: the export '{folder}' is kept, but it could NOT be verified: {problem}"
    gap = found["largest_difference"]
    image = "" if gap is None else f" and generates the same image (largest difference {gap:.1e})"
    return f"verified in a fresh process: stock diffusers loads the same {found['tensors']} tensors{image}" + problem


def compare(backbone: Backbone, folder: Path, resolution: int) -> dict[str, Any]:
    """Differences between an export and the run.

    Returns the content of verify.json: `differs` (descriptions), `tensors` (number of those compared),
    `largest_difference` of the sample images and their width `pixels` (both None without images). Tensors are compared
    by hashes in the dtype of the fresh process. Both images are sampled on the CPU in float32. Raises RuntimeError if
    the fresh process fails.
    """
    network = backbone.denoiser.network
    small = sum(p.numel() for p in network.parameters()) <= MAX_PARAMETERS_TO_SAMPLE
    draws = small and not quantized(network) and not is_sharded(backbone.denoiser)
    size = min(resolution, VERIFY_PIXELS // backbone.smallest * backbone.smallest)
    given = inputs_of(backbone, size) if draws else {}
    settings = {"num_inference_steps": VERIFY_STEPS, "height": size, "width": size, **backbone.guidance_call(1)}
    with tempfile.TemporaryDirectory() as scratch:
        found, theirs = fresh_process(backbone, folder, given, settings, Path(scratch))
    differs = [*other_tensors(network, found["tensors"]), *other_files(backbone, folder)]
    scales = {
        name: m.scaling[GENERATOR] for name, m in network.named_modules() if GENERATOR in getattr(m, "lora_A", ())
    }
    if wrong := [
        name for name in scales.keys() | found["scales"].keys() if scales.get(name) != found["scales"].get(name)
    ]:
        differs.append(f"{len(wrong)} LoRA layers have another scale (alpha / rank), such as '{min(wrong)}'")
    gap = None
    if theirs is not None:
        gap = (own_images(backbone, given, settings) - theirs).abs().max().item()
        if not gap <= TOLERANCE:
            differs.append(f"its image differs by {gap:.2e} from the image of the run")
    return {
        "differs": differs,
        "tensors": len(found["tensors"]) - len(quantized(network)),
        "largest_difference": gap,
        "pixels": size if draws else None,
    }


def inputs_of(backbone: Backbone, size: int) -> dict[str, Tensor]:
    """Random inputs of the stock pipeline: latents, prompt embeddings and, with a user adapter, a user embedding."""
    g = torch.Generator().manual_seed(0)
    width, pooled = backbone.prompt_widths
    inputs = {"latents": backbone.pipeline_latents(torch.randn(1, *backbone.latent_shape(size), generator=g))}
    cond = Cond(torch.randn(1, 8, width, generator=g), mask=torch.ones(1, 8))
    if pooled:
        cond = cond._replace(pooled=torch.randn(1, pooled, generator=g))
    inputs |= backbone.pipeline_text(cond)
    if kind_of(backbone) == "user adapter":
        inputs["user"] = torch.randn(1, 1, user_width(backbone.denoiser.network), generator=g)
    return inputs


def fresh_process(
    backbone: Backbone, folder: Path, given: Mapping[str, Tensor], settings: Mapping[str, Any], scratch: Path
) -> tuple[dict[str, Any], Tensor | None]:
    """Tensor hashes from stock diffusers in a fresh process, and its images if inputs are given."""
    whole_pipeline = kind_of(backbone) == "whole pipeline"
    dtypes = backbone.dtypes | ({"default": "float32"} if whole_pipeline else {})  # the dtypes of the run
    files = {name: str(scratch / name) for name in ("given", "found", "images")}
    save_file(dict(given), files["given"])
    request = {
        "kind": kind_of(backbone),
        "base": str(folder if whole_pipeline else backbone.path),
        "folder": str(folder),
        "network": backbone.network_name,
        "left_out": backbone.text_parts + [name for name, part in backbone.index.items() if part == [None, None]],
        "dtypes": dtypes,
        "draws": bool(given),
        "settings": settings,
        **files,
    }
    environment = {k: v for k, v in os.environ.items() if k not in DISTRIBUTED} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", FRESH, json.dumps(request)]
    fresh = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=VERIFY_SECONDS, check=False
    )
    if fresh.returncode < 0:
        raise RuntimeError(
            f"the fresh process was killed by {signal.Signals(-fresh.returncode).name}, possibly because memory ran out"
        )
    if fresh.returncode:
        raise RuntimeError(f"it does not load in a fresh process with plain diffusers:\n{fresh.stderr[-2000:]}")
    images = load_file(files["images"])["images"] if given else None
    return json.loads(Path(files["found"]).read_text()), images


def other_tensors(network: nn.Module, theirs: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    """Descriptions of tensors that differ between the network and the fresh process. theirs: name -> (dtype, hash)."""
    wrong, stored = [], quantized(network)
    for name, (dtype, digest) in theirs.items():
        place, _, leaf = name.rpartition(".")
        if place in stored and leaf == "weight":
            continue
        try:
            ours = getattr(network.get_submodule(place), leaf)  # merges the low-rank change of a parametrized weight
        except AttributeError:
            wrong.append(name)
            continue
        data: Any = whole(ours).to("cpu", getattr(torch, dtype)).reshape(-1).view(torch.uint8).numpy()
        if hashlib.blake2b(data, digest_size=16).hexdigest() != digest:
            wrong.append(name)
    if wrong:
        yield f"{len(wrong)} of {len(theirs)} tensors differ from those of the run, such as '{wrong[0]}'"
    ours = {n for n in network.state_dict() if ".parametrizations." not in n}
    ours = {n for n in ours if ".lora_" not in n or f".{GENERATOR}." in n}  # another adapter is not exported
    ours -= {f"{place}.scale" for place in stored}
    # A layer that only a LoRA which is not exported changes is a plain one there.
    if lost := sorted(n for n in ours - theirs.keys() if n.replace(".base_layer.", ".") not in theirs):
        yield f"{len(lost)} tensors of the run are missing in it, such as '{lost[0]}'"


def other_files(backbone: Backbone, folder: Path) -> Iterator[str]:
    """Descriptions of files of untrained parts that differ from the original pipeline's (whole pipelines only)."""
    for part in kept_parts(backbone) if kind_of(backbone) == "whole pipeline" else ():
        for file in sorted(p for p in (backbone.path / part).rglob("*") if p.is_file()):
            name = file.relative_to(backbone.path)
            if not (folder / name).exists() or not filecmp.cmp(file, folder / name, shallow=False):
                yield f"'{name}' differs from the file of the original pipeline"


def own_images(backbone: Backbone, given: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Images of the stock pipeline with the current weights for `inputs_of`, on the CPU in float32."""
    inputs: dict[str, Any] = dict(given)
    if "user" in inputs:
        inputs["ip_adapter_image_embeds"] = [inputs.pop("user")]
    try:
        pipeline = backbone.pipeline(on_cpu(backbone.denoiser.network), text=False).to("cpu").to(torch.float32)
        fixed = torch.Generator().manual_seed(0)  # few-step samplers add noise during sampling
        with seeded(0):  # flow pipelines do not pass the generator to the scheduler
            return pipeline(**inputs, **settings, generator=fixed, output_type="pt").images
    finally:
        backbone.release()  # its autoencoder was moved with the pipeline
