"""Pairs per second and peak memory of our Diffusion-DPO step against the released one, in one process.

    python benchmarks/pair_step.py                       # playground size, on the CPU
    python benchmarks/pair_step.py --size sd15           # SD1.5 size with random weights, on a GPU

The baseline restates the released training step: it decodes, resizes and flips the images, encodes images and captions
every step, holds a second U-Net as the reference and runs it on the batch. Ours reads cached latents and embeddings.
Same model, batch, precision and optimizer; the two take turns, so that whatever else the machine does hits both. Peak
memory is that of a process (CPU) or of the allocator (GPU) that runs only one of them. Writes results/pair_step.json.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torchvision import transforms
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffalign.algorithms.diffusion_dpo import DiffusionDPO
from diffalign.backbones import load_backbone
from diffalign.config import Config
from diffalign.lora import add_lora
from diffalign.playground import BASE, PAIRS
from diffalign.reference import reference_for
from diffalign.run import Run
from diffalign.trainer import Trainer, adamw

Step = Callable[[], None]
RESULTS = Path(__file__).parent / "results" / "pair_step.json"
LR = 1e-5


def baseline(path: Path, pairs: Path, resolution: int, batch: int, rank: int, device: torch.device) -> Step:
    """One optimizer step of the released Diffusion-DPO training script, restated."""
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet").to(device, torch.float32)
    reference = UNet2DConditionModel.from_pretrained(path, subfolder="unet").to(device, torch.float32)
    vae = AutoencoderKL.from_pretrained(path, subfolder="vae").to(device, torch.float32)
    text = CLIPTextModel.from_pretrained(path, subfolder="text_encoder").to(device, torch.float32)
    words = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler")
    for frozen in (reference, vae, text):
        frozen.requires_grad_(False)
    if rank:
        add_lora(unet, rank=rank, alpha=None, targets=("to_q", "to_k", "to_v", "to_out.0"), seed=0)
    unet.train()
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    prepare = transforms.Compose(
        [
            transforms.Resize(resolution),
            transforms.CenterCrop(resolution),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    at = 0

    def step() -> None:
        nonlocal at
        chosen = [rows[(at + i) % len(rows)] for i in range(batch)]
        at += batch
        images = [prepare(Image.open(pairs.parent / r[k]).convert("RGB")) for k in ("chosen", "rejected") for r in chosen]
        ids = words([r["prompt"] for r in chosen], padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                x0 = vae.encode(torch.stack(images).to(device)).latent_dist.sample() * vae.config.scaling_factor
                tokens = text(ids.to(device))[0].repeat(2, 1, 1)
            noise = torch.randn_like(x0).chunk(2)[0].repeat(2, 1, 1, 1)
            t = torch.randint(0, 1000, (batch,), device=device).repeat(2)
            x_t = scheduler.add_noise(x0, noise, t)
            v = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(x0, noise, t) if v else noise
            err_w, err_l = (unet(x_t, t, tokens).sample - target).pow(2).mean((1, 2, 3)).chunk(2)
            with torch.no_grad():
                ref_w, ref_l = (reference(x_t, t, tokens).sample - target).pow(2).mean((1, 2, 3)).chunk(2)
        loss = -F.logsigmoid(-2500 * ((err_w - err_l) - (ref_w - ref_l))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(
    path: Path, pairs: Path, resolution: int, batch: int, rank: int, device: torch.device, compile: bool, folder: Path
) -> Step:
    """One optimizer step of train/diffusion_dpo.py, caches on."""
    precision = "bf16" if device.type == "cuda" else "no"
    run = Run(Config({}), folder=str(folder), mixed_precision=precision)
    dtype = "bf16" if rank and device.type == "cuda" else "fp32"
    backbone = load_backbone(device, path=str(path), lora_rank=rank, dtype=dtype, compile=compile)
    data = run.pairs(
        backbone, path=str(pairs), resolution=resolution, batch_size=batch, cache=str(folder / "cache"), hflip=True
    )
    reference = reference_for(backbone.denoiser)
    policy = run.prepare(backbone.denoiser)
    dims = math.prod(backbone.latent_shape(resolution))
    algorithm = DiffusionDPO(policy, reference, backbone.schedule, run.draws, dims)
    backbone.release()
    loader = run.loader(data)
    trainer = Trainer(run, algorithm, {"policy": adamw(policy, lr=LR)}, steps=10**9)
    batches = algorithm.batches(loader.start(0))

    def step() -> None:
        for turn in algorithm.turns(0):
            trainer.take(turn, batches)

    return step
