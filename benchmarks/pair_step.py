"""Pairs per second and peak memory of our Diffusion-DPO and InPO steps against the released ones, in one process.

    python benchmarks/pair_step.py                       # playground size, on the CPU
    python benchmarks/pair_step.py --method inpo         # one of the two
    python benchmarks/pair_step.py --size sd15           # SD1.5 size with random weights, on a GPU

The baseline restates the released training step: it decodes, resizes and flips the images, encodes images and captions
every step, holds a second U-Net as the reference and runs it on the batch. InPO's is right for one pair at a time only,
so it accumulates as many as ours takes at once; it inverts with the policy in ten steps. Ours reads cached latents and
embeddings and inverts pairs of different depth together.
Same model, batch, precision and optimizer; the two take turns, so that whatever else the machine does hits both. Peak
memory is that of a process (CPU) or of the allocator (GPU) that runs only one of them. Writes results/pair_step.json.
"""

from __future__ import annotations

import argparse
import itertools
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
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torchvision import transforms
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffalign.algorithms.diffusion_dpo import DiffusionDPO
from diffalign.algorithms.inpo import InPO
from diffalign.backbones import load_backbone
from diffalign.config import Config
from diffalign.data import PreferencePairs
from diffalign.inversion import Inversion
from diffalign.lora import add_lora
from diffalign.noising import Noising
from diffalign.playground import BASE, PAIRS
from diffalign.reference import reference_for
from diffalign.run import Run
from diffalign.trainer import Trainer, adamw

Step = Callable[[], None]
RESULTS = Path(__file__).parent / "results" / "pair_step.json"
LR = 1e-5
METHODS = ("diffusion_dpo", "inpo")


def inverted(unet: Any, scheduler: Any, x0: Tensor, t: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The released inversion to the first level of 1, 101, ... not below t, and the noise it implies at t."""
    cleaned, x = scheduler.alphas_cumprod, x0
    v = scheduler.config.prediction_type == "v_prediction"
    for g in [g for g in range(-99, 802, 100) if g < t]:
        now, then = cleaned[max(g, 0)], cleaned[g + 100]
        out = unet(x, torch.full((len(x),), g, device=x.device), tokens).sample
        eps = (1 - now).sqrt() * x + now.sqrt() * out if v else out
        clean = now.sqrt() * x - (1 - now).sqrt() * out if v else (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = then.sqrt() * clean + (1 - then).sqrt() * eps
        spread = ((1 - now) / (1 - then) * (1 - then / now)).clamp(min=0).sqrt()
        x = x + 0.1 * spread * torch.randn_like(x)
    a2 = cleaned[t]
    return x, (x - a2.sqrt() * x0) / (1 - a2).sqrt()


def baseline(
    path: Path, pairs: Path, resolution: int, batch: int, rank: int, device: torch.device, method: str
) -> Step:
    """One optimizer step of the released training script of Diffusion-DPO or of InPO, restated."""
    micro = 1 if method == "inpo" else batch
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

    def accumulate() -> None:
        nonlocal at
        chosen = [rows[(at + i) % len(rows)] for i in range(micro)]
        at += micro
        images = [
            prepare(Image.open(pairs.parent / r[k]).convert("RGB")) for k in ("chosen", "rejected") for r in chosen
        ]
        ids = words([r["prompt"] for r in chosen], padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                x0 = vae.encode(torch.stack(images).to(device)).latent_dist.sample() * vae.config.scaling_factor
                tokens = text(ids.to(device))[0].repeat(2, 1, 1)
            noise = torch.randn_like(x0).chunk(2)[0].repeat(2, 1, 1, 1)
            t = torch.randint(0, 1000, (micro,), device=device).repeat(2)
            x_t = scheduler.add_noise(x0, noise, t)
            if method == "inpo":
                with torch.no_grad():
                    x_t, noise = inverted(unet, scheduler, x0, int(t[0]), tokens)
            v = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(x0, noise, t) if v else noise
            err_w, err_l = (unet(x_t, t, tokens).sample - target).pow(2).mean((1, 2, 3)).chunk(2)
            with torch.no_grad():
                ref_w, ref_l = (reference(x_t, t, tokens).sample - target).pow(2).mean((1, 2, 3)).chunk(2)
        loss = -F.logsigmoid(-2500 * ((err_w - err_l) - (ref_w - ref_l))).mean()
        (loss * micro / batch).backward()

    def step() -> None:
        for _ in range(batch // micro):
            accumulate()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(
    path: Path, pairs: Path, resolution: int, batch: int, rank: int, device: torch.device, method: str, folder: Path
) -> Step:
    """One optimizer step of train/diffusion_dpo.py or train/inpo.py, caches on."""
    precision = "bf16" if device.type == "cuda" else "no"
    run = Run(Config({}), folder=str(folder), mixed_precision=precision)
    dtype = "bf16" if rank and device.type == "cuda" else "fp32"
    backbone = load_backbone(device, path=str(path), lora_rank=rank, dtype=dtype)
    data = run.latents(
        PreferencePairs,
        backbone,
        path=str(pairs),
        resolution=resolution,
        batch_size=batch,
        cache=str(folder / "cache"),
        hflip=True,
        draws_per_sample=None if method == "inpo" else 2,
    )
    noising = Noising(backbone.schedule, run.draws)
    reference = reference_for(backbone.denoiser)
    policy = run.prepare(backbone.denoiser)
    dims = math.prod(backbone.latent_shape(resolution))
    algorithm: DiffusionDPO
    if method == "inpo":
        inversion, empty = Inversion(backbone.schedule, run.draws, steps=10, eta=0.1), backbone.encode_text([""])
        algorithm = InPO(policy, reference, noising, dims, inversion, backbone.denoiser, empty)
    else:
        algorithm = DiffusionDPO(policy, reference, noising, dims)
    backbone.release()
    loader = run.loader(data)
    if data.draws_per_sample:
        algorithm.remember_reference(loader.once(), run.gather)
    del reference
    trainer = Trainer(run, algorithm, {"policy": adamw(policy, lr=LR)}, steps=10**9)
    batches = algorithm.batches(loader.start(0))

    def step() -> None:
        for turn in algorithm.turns(0):
            trainer.take(turn, batches)

    return step


def playground_pairs(folder: Path, size: int) -> Path:
    """64 of the shipped pairs as JPEG files of `size` pixels and a JSONL file."""
    import io

    import pyarrow.parquet as pq

    rows = pq.read_table(PAIRS).slice(0, 64).to_pylist()
    lines = []
    for i, row in enumerate(rows):
        for name, column in (("w", "jpg_0"), ("l", "jpg_1")):
            image = Image.open(io.BytesIO(row[column])).resize((size, size), Image.Resampling.BICUBIC)
            image.save(folder / f"{name}{i}.jpg", quality=92)
        lines.append(json.dumps({"prompt": row["caption"], "chosen": f"w{i}.jpg", "rejected": f"l{i}.jpg"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


def random_sd15(folder: Path) -> Path:
    """A pipeline folder of SD1.5's architecture with random weights and the playground's tokenizer."""
    words = CLIPTokenizer.from_pretrained(BASE, subfolder="tokenizer")
    words.model_max_length = 77
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768}
    text = CLIPTextConfig(**sizes, num_hidden_layers=12, num_attention_heads=12, eos_token_id=words.eos_token_id)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def build(who: str, args: argparse.Namespace, rank: int, folder: Path) -> Step:
    device = torch.device("cuda" if args.size == "sd15" else "cpu")
    path = folder.parent / "sd15" if args.size == "sd15" else BASE
    resolution = 512 if args.size == "sd15" else 32
    common = (path, folder.parent / "pairs.jsonl", resolution, args.batch, rank, device, args.method)
    return baseline(*common) if who == "baseline" else ours(*common, folder)


def peak_mb(who: str, args: argparse.Namespace, rank: int, folder: Path) -> float:
    """Peak memory of a process that takes a few steps of one of the two."""
    command = [sys.executable, __file__, "--size", args.size, "--batch", str(args.batch), "--rank", str(rank)]
    command += ["--method", args.method]
    command += ["--only", who, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def only(args: argparse.Namespace) -> None:
    step = build(args.only, args, args.rank, Path(args.folder))
    for _ in range(4):
        step()
    cuda = args.size == "sd15"
    peak = (
        torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    print(f"{peak:.0f}")


def cpu() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def timed(step: Step, n: int, cuda: bool) -> float:
    started = time.perf_counter()
    for _ in range(n):
        step()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("playground", "sd15"), default="playground")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--method", choices=METHODS, help="default: both")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each of the two, 3 steps a turn")
    parser.add_argument("--rank", type=int, action="append", help="LoRA rank, 0 for full; default: 8 and 0")
    parser.add_argument("--only", choices=("ours", "baseline"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        args.rank = args.rank[0]
        return only(args)
    cuda = args.size == "sd15"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        playground_pairs(folder, 512 if cuda else 32)
        if cuda:
            random_sd15(folder / "sd15")
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        methods, ranks = [args.method] if args.method else METHODS, args.rank or (8, 0)
        for args.method, rank in itertools.product(methods, ranks):
            row = compare(args, rank, folder)
            rows = [r for r in rows if (r["case"], r["device"]) != (row["case"], row["device"])] + [row]
            print(json.dumps(row), flush=True)
    RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def compare(args: argparse.Namespace, rank: int, folder: Path) -> dict[str, object]:
    cuda = args.size == "sd15"
    name = f"{args.method}-{rank}"
    memory = {who: peak_mb(who, args, rank, folder / f"memory-{who}-{name}") for who in ("ours", "baseline")}
    steps = {who: build(who, args, rank, folder / f"speed-{who}-{name}") for who in ("ours", "baseline")}
    for step in steps.values():
        timed(step, 3, cuda)
    seconds: dict[str, list[float]] = {"ours": [], "baseline": []}
    for _ in range(args.rounds):
        for who, step in steps.items():
            seconds[who].append(timed(step, 3, cuda))
    rate = {who: args.batch / statistics.median(s) for who, s in seconds.items()}
    ratios = sorted(b / a for a, b in zip(seconds["ours"], seconds["baseline"], strict=True))
    learning = runpy.run_path(str(Path(__file__).with_name("learning.py")), run_name="learning")
    return {
        "case": f"{args.method} {'lora' if rank else 'full'}, {args.size}, {args.batch} pairs a step",
        "device": torch.cuda.get_device_name() if cuda else f"{cpu()}, {torch.get_num_threads()} threads",
        "ours": round(rate["ours"], 2),
        "baseline": round(rate["baseline"], 2),
        "ratio": round(statistics.median(ratios), 3),
        "unit": "pairs/s",
        "peak_mb_ours": memory["ours"],
        "peak_mb_baseline": memory["baseline"],
        "commit": learning["commit"](),
    }


if __name__ == "__main__":
    main()
