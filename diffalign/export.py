"""The result of a run in diffusers layout, and the proof that stock diffusers reproduces it in a fresh process."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from diffalign.backbones import Backbone
from diffalign.lora import lora_layers
from diffalign.user_adapter import FILE, has_user_adapter, user_width
from reward_models.files import writing

VERIFY_STEPS = 4
TOLERANCE = 1e-4
LOADED_BY = {
    "whole pipeline": "DiffusionPipeline.from_pretrained('{}')",
    "LoRA": "pipe.load_lora_weights('{}')",
    "user adapter": f"pipe.load_ip_adapter('{{}}', subfolder='', weight_name='{FILE}', image_encoder_folder=None)",
}
DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment of a launcher, which the fresh process must not inherit."""

FRESH = '''
"""Run by a process in which diffalign cannot be imported."""
import json, sys
from pathlib import Path
sys.modules["diffalign"] = None
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
kind, base, folder, given, out, steps, size, dtype, vae_dtype = sys.argv[1:]
index = json.loads(Path(base, "model_index.json").read_text())
left_out = {"safety_checker": None} | {name: None for name, part in index.items() if part == [None, None]}
rounded = {"default": getattr(torch, dtype), "vae": getattr(torch, vae_dtype)}
pipeline = DiffusionPipeline.from_pretrained(base, torch_dtype=rounded, **left_out).to(torch.float32)
given = load_file(given)
latents, heard = given.pop("latents"), {}
if kind == "LoRA":
    pipeline.load_lora_weights(folder)
if kind == "user adapter":
    pipeline.load_ip_adapter(folder, subfolder="", weight_name="user_adapter.safetensors", image_encoder_folder=None)
    heard = {"ip_adapter_image_embeds": [given["user"]]}
pipeline.set_progress_bar_config(disable=True)
torch.manual_seed(0)
fixed = torch.Generator().manual_seed(0)
images = pipeline("", latents=latents, num_inference_steps=int(steps), guidance_scale=1.0, **heard,
                  generator=fixed, height=int(size), width=int(size), output_type="pt").images
save_file({"images": images.contiguous()}, out)
'''


def export(backbone: Backbone, folder: Path, resolution: int, *, verify: bool) -> str:
    """Write the denoiser's present weights to `folder` (replacing it), check them, and say how to load them.

    Raises RuntimeError when a fresh process with plain diffusers does not reproduce the same images to 1e-4.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(temporary):
        backbone.save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    how = LOADED_BY[kind_of(backbone)].format(folder)
    if not verify:
        return f"exported; load it with {how}"
    gap = fresh_process_gap(backbone, folder, resolution)
    if not gap <= TOLERANCE:
        raise RuntimeError(f"'{folder}' loaded in a fresh process differs by {gap:.2e} from the run's own pipeline")
    return f"exported, verified in a fresh process (largest difference {gap:.1e}); load it with {how}"


def kind_of(backbone: Backbone) -> str:
    """What of a backbone is exported."""
    network = backbone.denoiser.network
    return "user adapter" if has_user_adapter(network) else "LoRA" if lora_layers(network) else "whole pipeline"


def fresh_process_gap(backbone: Backbone, folder: Path, resolution: int) -> float:
    """The largest pixel difference between the run's pipeline and the export loaded by stock diffusers elsewhere.

    Both run on the CPU in float32 from the same latents, so the difference is that of the weights.
    """
    latents = torch.randn(1, *backbone.latent_shape(resolution), generator=torch.Generator().manual_seed(0))
    inputs = {"latents": backbone.pipeline_latents(latents)}
    kind = kind_of(backbone)
    if kind == "user adapter":
        width = user_width(backbone.denoiser.network)
        inputs["user"] = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch, "given.safetensors"), Path(scratch, "out.safetensors")
        save_file(inputs, given)
        base = str(folder if kind == "whole pipeline" else backbone.path)
        arguments = [kind, base, str(folder), str(given), str(out), str(VERIFY_STEPS), str(resolution)]
        whole = kind == "whole pipeline"
        dtypes = (torch.float32, torch.float32) if whole else (backbone.dtype, backbone.vae_dtype)
        arguments += [str(dtype).removeprefix("torch.") for dtype in dtypes]
        environment = {k: v for k, v in os.environ.items() if k not in DISTRIBUTED} | {"CUDA_VISIBLE_DEVICES": ""}
        fresh = subprocess.run(
            [sys.executable, "-c", FRESH, *arguments], capture_output=True, text=True, env=environment, check=False
        )
        if fresh.returncode:
            raise RuntimeError(
                f"'{folder}' does not load in a fresh process with plain diffusers:\n{fresh.stderr[-2000:]}"
            )
        theirs = load_file(out)["images"]
    ours = own_images(backbone, inputs["latents"], resolution, inputs.get("user"))
    return (ours - theirs).abs().max().item()


def own_images(
    backbone: Backbone, latents: torch.Tensor, resolution: int, user: torch.Tensor | None = None
) -> torch.Tensor:
    """What the present weights draw from latents [B, C, h, w], for a user [1, T, D] where there is one, in the stock
    pipeline, on the CPU in float32."""
    network = copy.deepcopy(backbone.denoiser.network).cpu().float()
    pipeline = backbone.pipeline(network).to("cpu").to(torch.float32)
    settings: dict[str, Any] = {"num_inference_steps": VERIFY_STEPS, "guidance_scale": 1.0}
    settings |= {"height": resolution, "width": resolution}
    settings |= {} if user is None else {"ip_adapter_image_embeds": [user]}
    fixed = torch.Generator().manual_seed(0)  # of few-step samplers, which add noise on the way
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the flow pipelines do not pass theirs on
        images = pipeline("", latents=latents, generator=fixed, output_type="pt", **settings).images
    backbone.release()  # its encoders were moved with the pipeline
    return images
