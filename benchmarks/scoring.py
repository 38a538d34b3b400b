"""Images per second of `reward-score` against the published loop over single images.

    python benchmarks/scoring.py                     # ViT-B-32, on the CPU; benchmarks/gpu.py has ViT-H-14
    python benchmarks/scoring.py --images 64         # a short run

The same network with random weights and the same JPEGs (512 to 1024 pixels, mixed shapes) in one process, one after the
other, twice; the better time counts:
  baseline  one image at a time: open, open_clip's preprocessing by Pillow, encode image, encode prompt, cosine
  ours      what the command runs: decode and resize in threads, batches, prompts encoded once
  forward   only the two towers on prepared batches, every image and prompt once: the upper bound
Four images share a prompt, as candidates do. At most DISTINCT images are created; the others are the same files under
other names, since neither side caches images. Writes benchmarks/results/scoring.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from results_file import RESULTS, commit, cpu
from torch.nn import functional as F

from reward_models.clip.scorers import CLIPScorer
from reward_models.files import write_whole
from reward_models.folder.decoding import Decoder
from reward_models.folder.item import Item
from reward_models.folder.scoring import batch_size_for, score_items
from reward_models.placement import as_input, upload

ROWS = RESULTS / "scoring.json"
SIDES = (512, 640, 768, 896, 1024)
DISTINCT = 32


def make_images(folder: Path, count: int, sides: Sequence[int] = SIDES) -> list[Path]:
    """JPEG files with the smoothness and size of photographs, in several shapes."""
    random = np.random.default_rng(0)
    files = [folder / f"{k:05d}.jpg" for k in range(count)]
    for k, file in enumerate(files):
        if k >= DISTINCT:
            os.link(files[k % DISTINCT], file)
            continue
        width, height = (int(random.choice(sides)) for _ in range(2))
        small = Image.fromarray(random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(file, quality=92)
    return files


def make_prompts(count: int) -> list[str]:
    """Prompts, one per image; four images share a prompt."""
    return [f"a photograph of subject number {k // 4} in the evening light" for k in range(count)]


@torch.no_grad()
def baseline(scorer: CLIPScorer, files: list[Path], prompts: list[str], device: torch.device) -> None:
    """The published loop, restated."""
    preprocess: Any = image_transform_v2(PreprocessCfg(size=scorer.rule.size), is_train=False)
    tokenizer = open_clip.SimpleTokenizer()
    for file, prompt in zip(files, prompts, strict=True):
        image = preprocess(Image.open(file).convert("RGB"))[None].to(device)
        text = tokenizer([prompt]).to(device)
        features = F.normalize(scorer.clip.encode_image(image), dim=-1)
        (features @ F.normalize(scorer.clip.encode_text(text), dim=-1).T).item()


def ours(scorer: Any, decoder: Decoder, files: list[Path], prompts: list[str], device: torch.device) -> None:
    """What the command runs once its decoder and its scorer are ready."""
    scorer.clear_cache()
    for _ in score_items(batches(files, prompts, device), {"scorer": scorer}, decoder):
        pass


def decode(scorer: Any, decoder: Decoder, files: list[Path], prompts: list[str], device: torch.device) -> None:
    """The decoder alone."""
    for _ in decoder.batches(batches(files, prompts, device), scorer.rule):
        pass


def batches(files: list[Path], prompts: list[str], device: torch.device) -> Iterator[list[Item]]:
    size = batch_size_for(device)
    items = [Item(file.name, prompt, file) for file, prompt in zip(files, prompts, strict=True)]
    return (items[i : i + size] for i in range(0, len(items), size))


@torch.no_grad()
def forward(scorer: Any, prompts: list[str], device: torch.device) -> None:
    """The image tower on a batch that is on the device, for every image; the text tower on every different prompt."""
    size, side = batch_size_for(device), scorer.rule.size
    tokens = upload(scorer.tokenize(list(dict.fromkeys(prompts))), device)
    for part in tokens.split(size):
        scorer.clip.encode_text(part)
    pixels = as_input(scorer.clip, torch.randn(size, 3, side, side, device=device))
    for i in range(0, len(prompts), size):
        scorer.clip.encode_image(pixels[: len(prompts) - i])


def best_of_two(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and the peak of this process's memory so far in MB."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--model", default="ViT-B-32", help="open_clip architecture")
    args = parser.parse_args()
    device = torch.device("cpu")
    torch.manual_seed(0)
    scorer = CLIPScorer(args.model).eval().requires_grad_(False)
    prompts = make_prompts(args.images)
    with tempfile.TemporaryDirectory() as folder:
        files = make_images(Path(folder), args.images)
        baseline(scorer, files[:2], prompts[:2], device)  # warm-up
        theirs, their_mb = best_of_two(lambda: baseline(scorer, files, prompts, device))
        with Decoder() as decoder:
            mine, our_mb = best_of_two(lambda: ours(scorer, decoder, files, prompts, device))
    ready, _ = best_of_two(lambda: forward(scorer, prompts, device))
    row = {
        "case": f"reward-score {args.model}",
        "device": f"{os.cpu_count()} cores {cpu()}",
        "ours": round(args.images / mine, 2),
        "baseline": round(args.images / theirs, 2),
        "ratio": round(theirs / mine, 2),
        "unit": "images/s",
        "peak_mb_ours": round(our_mb),
        "peak_mb_baseline": round(their_mb),
        "forward": round(args.images / ready, 2),
        "share_of_forward": round(ready / mine, 3),
        "images": args.images,
        "commit": commit(),
    }
    print(json.dumps(row, indent=1))
    write_whole(ROWS, json.dumps([row], indent=1) + "\n")


if __name__ == "__main__":
    main()
