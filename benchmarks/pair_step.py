"""Pairs per second and peak memory of our Diffusion-DPO and InPO steps against the released ones, in one process.

    python benchmarks/pair_step.py                       # both, on the CPU
    python benchmarks/pair_step.py --method inpo         # one of the two
    python benchmarks/pair_step.py --compile whole       # Diffusion-DPO, compiled as well

Models have playground size; benchmarks/gpu.py uses real sizes. The baseline is benchmarks/released_step.py. Ours reads
cached latents and embeddings, and inverts pairs of different timesteps together. Model, batch, precision and optimizer
are the same. The two alternate, so that other load on the machine affects both. Peak memory is measured in a process
that runs only one of them. Writes results/pair_step.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from random_models import playground_pairs
from released_step import LR, Step, released_step
from results_file import RESULTS, TEXT, commit, cpu, read_rows, write_rows

from diffalign.algorithms.denoising import Remembered
from diffalign.algorithms.diffusion_dpo import DiffusionDPO
from diffalign.algorithms.inpo import InPO
from diffalign.commands import program
from diffalign.config import Config
from diffalign.data import PreferencePairs
from diffalign.diffusion.inversion import Inversion
from diffalign.diffusion.noising import Noising
from diffalign.networks.compilation import compile_seconds
from diffalign.networks.loading import load_backbone
from diffalign.networks.reference import reference_for
from diffalign.playground import BASE
from diffalign.training.optim import make_player
from diffalign.training.run import Run
from diffalign.training.trainer import Trainer

ROWS = RESULTS / "pair_step.json"
RESOLUTION = 32
METHODS = ("diffusion_dpo", "inpo")
CPU = torch.device("cpu")
os.environ["ACCELERATE_USE_CPU"] = "true"  # also on a machine with a GPU


def ours(pairs: Path, batch: int, rank: int, method: str, folder: Path, how: str) -> Step:
    """One optimizer step of train/diffusion_dpo.py or train/inpo.py, caches on."""
    run = Run(Config({}), folder=str(folder), mixed_precision="no")
    backbone = load_backbone(CPU, path=str(BASE), lora_rank=rank, compile=how)
    data = run.latents(
        PreferencePairs,
        backbone,
        path=str(pairs),
        resolution=RESOLUTION,
        batch_size=batch,
        cache=str(folder / "cache"),
        hflip=True,
        draws_per_sample=None if method == "inpo" else 2,
    )
    noising = Noising(backbone.schedule, run.draws)
    reference = reference_for(backbone.denoiser)
    policy = run.prepare(backbone.denoiser)
    dims = math.prod(backbone.latent_shape(RESOLUTION))
    algorithm: DiffusionDPO
    if method == "inpo":
        inversion, empty = Inversion(backbone.schedule, run.draws, steps=10, eta=0.1), backbone.encode_text([""])
        algorithm = InPO(policy, reference, noising, dims, inversion, backbone.denoiser, empty)
    else:
        algorithm = DiffusionDPO(policy, reference, noising, dims)
    backbone.release()
    loader = run.loader(data)
    if data.draws_per_sample:
        kept = Remembered(np.empty((data.draws_per_sample, data.places), np.float32))
        algorithm.ask_reference(loader.once(), kept)
        algorithm.remember(kept)
    del reference
    trainer = Trainer(run, algorithm, {"policy": make_player(policy, lr=LR)}, steps=10**9)
    batches = algorithm.batches(loader.start(0))

    def step() -> None:
        for turn in algorithm.turns(0):
            trainer.take(turn, batches)

    return step


def build(who: str, args: argparse.Namespace, rank: int, folder: Path) -> Step:
    pairs = folder.parent / "pairs" / "pairs.jsonl"
    if who == "baseline":
        return released_step(BASE, pairs, RESOLUTION, args.batch, rank, CPU, args.method)
    return ours(pairs, args.batch, rank, args.method, folder, args.compile if who == "compiled" else "off")


def peak_mb(who: str, args: argparse.Namespace, rank: int, folder: Path) -> float:
    """Peak memory of a process that runs a few steps of one side."""
    command = [sys.executable, __file__, "--batch", str(args.batch), "--rank", str(rank), "--method", args.method]
    command += ["--only", who, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def only(args: argparse.Namespace) -> None:
    step = build(args.only, args, args.rank, Path(args.folder))
    for _ in range(4):
        step()
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")


def timed(step: Step, n: int) -> float:
    started = time.perf_counter()
    for _ in range(n):
        step()
    return (time.perf_counter() - started) / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="pairs per step")
    parser.add_argument("--method", choices=METHODS, help="default: both")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of each side, 3 steps per round")
    parser.add_argument("--rank", type=int, action="append", help="LoRA rank, 0 for full fine-tuning; default: 8 and 0")
    parser.add_argument("--compile", choices=("blocks", "whole"), help="Diffusion-DPO, also with backbone.compile")
    parser.add_argument("--only", choices=("ours", "baseline"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        args.rank = args.rank[0]
        return only(args)
    rows = read_rows(ROWS, {"case": TEXT, "device": TEXT})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        playground_pairs(folder / "pairs", RESOLUTION)
        methods, ranks = [args.method] if args.method else METHODS[: 1 if args.compile else 2], args.rank or (8, 0)
        for args.method, rank in itertools.product(methods, ranks):
            row = compare(args, rank, folder)
            rows = [r for r in rows if (r["case"], r["device"]) != (row["case"], row["device"])] + [row]
            print(json.dumps(row), flush=True)
    write_rows(ROWS, rows)


def compare(args: argparse.Namespace, rank: int, folder: Path) -> dict[str, object]:
    name = f"{args.method}-{rank}"
    memory = {who: peak_mb(who, args, rank, folder / f"memory-{who}-{name}") for who in ("ours", "baseline")}
    sides = ("ours", "compiled", "baseline") if args.compile else ("ours", "baseline")
    steps = {who: build(who, args, rank, folder / f"speed-{who}-{name}") for who in sides}
    for step in steps.values():
        timed(step, 3)
    seconds: dict[str, list[float]] = {who: [] for who in sides}
    for _ in range(args.rounds):
        for who, step in steps.items():
            seconds[who].append(timed(step, 3))
    rate = {who: args.batch / statistics.median(s) for who, s in seconds.items()}

    def ratio(who: str) -> float:
        return round(statistics.median(b / a for a, b in zip(seconds[who], seconds["baseline"], strict=True)), 3)

    compiled = {"compiled": round(rate["compiled"], 2), "compiled_ratio": ratio("compiled")} if args.compile else {}
    compiled |= {"compile": args.compile, "compile_s": round(compile_seconds(), 1)} if args.compile else {}
    return {
        "case": f"{args.method} {'lora' if rank else 'full'}, playground, {args.batch} pairs a step",
        "device": f"{cpu()}, {torch.get_num_threads()} threads",
        "ours": round(rate["ours"], 2),
        "baseline": round(rate["baseline"], 2),
        "ratio": ratio("ours"),
        **compiled,
        "unit": "pairs/s",
        "peak_mb_ours": memory["ours"],
        "peak_mb_baseline": memory["baseline"],
        "commit": commit(),
    }


if __name__ == "__main__":
    program.run(main)
