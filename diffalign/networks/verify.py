"""An export, held against the run: what stock diffusers finds in it in a fresh process."""

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
from diffalign.networks.placement import on_cpu, whole
from diffalign.networks.user_adapter import user_width
from reward_models.files import write_whole

VERIFY_STEPS = 4
VERIFY_PIXELS = 256
VERIFY_SECONDS = 1800
DRAWN = 4_000_000_000
"""Parameters up to which an image is drawn as well: 16 GB of memory. A larger network is compared tensor by tensor."""
TOLERANCE = 1e-4
DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment of a launcher, which the fresh process must not inherit."""

FRESH = '''
"""Run by a process in which diffalign cannot be imported. Text encoders are not loaded: embeddings are given."""
import hashlib, json, sys
from pathlib import Path
sys.modules["diffalign"] = None
try:
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, this process ends and not the run
except OSError:
    pass
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
asked = json.loads(sys.argv[1])
dtypes = {name: getattr(torch, dtype) for name, dtype in asked["dtypes"].items()}
pipeline = DiffusionPipeline.from_pretrained(asked["base"], torch_dtype=dtypes, **dict.fromkeys(asked["left_out"]))
if asked["draws"]:
    pipeline = pipeline.to(torch.float32)
if asked["kind"] == "LoRA":
    weights = {"weight_name": "pytorch_lora_weights.safetensors", "adapter_name": "default"}
    pipeline.load_lora_weights(asked["folder"], **weights)
if asked["kind"] == "user adapter":
    adapter = {"subfolder": "", "weight_name": "user_adapter.safetensors", "image_encoder_folder": None}
    pipeline.load_ip_adapter(asked["folder"], **adapter)
network = getattr(pipeline, asked["network"])
tensors = {}
for name, value in network.state_dict().items():
    data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    tensors[name] = [str(value.dtype).removeprefix("torch."), hashlib.blake2b(data, digest_size=16).hexdigest()]
layers = {name: module for name, module in network.named_modules() if "default" in getattr(module, "lora_A", ())}
scales = {name: layer.scaling["default"] for name, layer in layers.items()}
Path(asked["found"]).write_text(json.dumps({"tensors": tensors, "scales": scales}))
if asked["draws"]:
    given = load_file(asked["given"])
    if "user" in given:
        given["ip_adapter_image_embeds"] = [given.pop("user")]
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    fixed = torch.Generator().manual_seed(0)
    images = pipeline(**given, **asked["settings"], generator=fixed, output_type="pt").images
    save_file({"images": images.contiguous()}, asked["images"])
'''


def verify(backbone: Backbone, folder: Path, resolution: int) -> str:
    """Compare an export with the denoiser's present weights, write the outcome to verify.json in it, and say it.

    Every tensor must be the same, and where the network is not too large an image of at most 256 pixels as well. Never
    raises: the run is done and its export is written, whatever goes wrong here.
    """
    found: dict[str, Any] = {"verified": False}
    try:
        found |= compare(backbone, folder, resolution)
        found["verified"] = not found["differs"]
        said = "; ".join(found["differs"])
    except Exception as error:  # out of memory, a full disk, a process that was killed, a library that cannot load it
        said = found["error"] = f"{type(error).__name__}: {error}"
    try:
        write_whole(folder / "verify.json", json.dumps(found, indent=2) + "\n")
    except OSError as error:
        said += f"; '{folder / 'verify.json'}' cannot be written: {error}"
    if not found["verified"]:
        return f"WARNING: the export '{folder}' is kept, but it could NOT be verified: {said}"
    gap = found["largest_difference"]
    image = "" if gap is None else f" and draws the same image (largest difference {gap:.1e})"
    return f"verified in a fresh process: stock diffusers finds the same {found['tensors']} tensors{image}" + said


def compare(backbone: Backbone, folder: Path, resolution: int) -> dict[str, Any]:
    """What of an export differs from the run, in words; how many tensors there are, and the image's largest difference
    (None without one) and width.

    Tensors are compared by digests, one at a time, in the dtype in which the fresh process has them. Both images are
    drawn on the CPU in float32. Raises RuntimeError where the fresh process fails.
    """
    network = backbone.denoiser.network
    draws = sum(p.numel() for p in network.parameters()) <= DRAWN
    size = min(resolution, VERIFY_PIXELS // backbone.smallest * backbone.smallest)
    given = inputs_of(backbone, size) if draws else {}
    settings = {"num_inference_steps": VERIFY_STEPS, "guidance_scale": 1.0, "height": size, "width": size}
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
            differs.append(f"an image of it differs by {gap:.2e} from the run's own")
    return {
        "differs": differs,
        "tensors": len(found["tensors"]),
        "largest_difference": gap,
        "pixels": size if draws else None,
    }


def inputs_of(backbone: Backbone, size: int) -> dict[str, Tensor]:
    """Latents, the embedding of a prompt and, where there is one, a user's, all random, for the stock pipeline."""
    g = torch.Generator().manual_seed(0)
    width, pooled = backbone.prompt_widths
    inputs = {"latents": backbone.pipeline_latents(torch.randn(1, *backbone.latent_shape(size), generator=g))}
    inputs["prompt_embeds"] = torch.randn(1, 8, width, generator=g)
    if pooled:
        inputs["pooled_prompt_embeds"] = torch.randn(1, pooled, generator=g)
    if kind_of(backbone) == "user adapter":
        inputs["user"] = torch.randn(1, 1, user_width(backbone.denoiser.network), generator=g)
    return inputs


def fresh_process(
    backbone: Backbone, folder: Path, given: Mapping[str, Tensor], settings: Mapping[str, Any], scratch: Path
) -> tuple[dict[str, Any], Tensor | None]:
    """The digests that stock diffusers finds elsewhere, and the images that it draws where inputs are given."""
    whole_pipeline = kind_of(backbone) == "whole pipeline"
    dtypes = backbone.dtypes | ({"default": "float32"} if whole_pipeline else {})  # as the run rounds
    files = {name: str(scratch / name) for name in ("given", "found", "images")}
    save_file(dict(given), files["given"])
    asked = {
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
    command = [sys.executable, "-c", FRESH, json.dumps(asked)]
    fresh = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=VERIFY_SECONDS, check=False
    )
    if fresh.returncode < 0:
        raise RuntimeError(f"the fresh process was ended by {signal.Signals(-fresh.returncode).name}; out of memory?")
    if fresh.returncode:
        raise RuntimeError(f"it does not load in a fresh process with plain diffusers:\n{fresh.stderr[-2000:]}")
    images = load_file(files["images"])["images"] if given else None
    return json.loads(Path(files["found"]).read_text()), images


def other_tensors(network: nn.Module, theirs: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    """What of the network's tensors is not as found, in words. theirs: name -> (dtype, digest)."""
    wrong = []
    for name, (dtype, digest) in theirs.items():
        place, _, leaf = name.rpartition(".")
        try:
            ours = getattr(network.get_submodule(place), leaf)  # which multiplies a parametrized weight out
        except AttributeError:
            wrong.append(name)
            continue
        data: Any = whole(ours).to("cpu", getattr(torch, dtype)).reshape(-1).view(torch.uint8).numpy()
        if hashlib.blake2b(data, digest_size=16).hexdigest() != digest:
            wrong.append(name)
    if wrong:
        yield f"{len(wrong)} of {len(theirs)} tensors are not the run's, such as '{wrong[0]}'"
    ours = {n for n in network.state_dict() if ".parametrizations." not in n}
    ours = {n for n in ours if ".lora_" not in n or f".{GENERATOR}." in n}  # another adapter is not exported
    if lost := sorted(ours - theirs.keys()):
        yield f"{len(lost)} tensors of the run are not in it, such as '{lost[0]}'"


def other_files(backbone: Backbone, folder: Path) -> Iterator[str]:
    """Files of a whole pipeline's other parts that are not those of the pipeline where the run began."""
    for part in kept_parts(backbone) if kind_of(backbone) == "whole pipeline" else ():
        for file in sorted(p for p in (backbone.path / part).rglob("*") if p.is_file()):
            name = file.relative_to(backbone.path)
            if not (folder / name).exists() or not filecmp.cmp(file, folder / name, shallow=False):
                yield f"'{name}' is not the file that the run began with"


def own_images(backbone: Backbone, given: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """What the present weights draw from `inputs_of` in the stock pipeline, on the CPU in float32."""
    inputs: dict[str, Any] = dict(given)
    if "user" in inputs:
        inputs["ip_adapter_image_embeds"] = [inputs.pop("user")]
    try:
        pipeline = backbone.pipeline(on_cpu(backbone.denoiser.network), text=False).to("cpu").to(torch.float32)
        fixed = torch.Generator().manual_seed(0)  # of few-step samplers, which add noise on the way
        with seeded(0):  # the flow pipelines do not pass theirs on
            return pipeline(**inputs, **settings, generator=fixed, output_type="pt").images
    finally:
        backbone.release()  # its autoencoder was moved with the pipeline
