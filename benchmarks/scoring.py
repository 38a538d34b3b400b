"""Images a second of `reward-score`, against the loop that scorers are published with.

    python benchmarks/scoring.py                     # ViT-B-32 on a CPU, ViT-H-14 on a GPU
    python benchmarks/scoring.py --images 64         # a look

The same network with random weights and the same JPEGs (512 to 1024 pixels, mixed shapes) in one process, one after the
other, twice, the better time of each:
  baseline  one image at a time: open, open_clip's preprocessing by Pillow, encode image, encode prompt, cosine
  ours      what the command runs: decode and resize in threads, batches, prompts encoded once
  forward   the two towers alone on batches that are ready, which nothing can beat: every image and every prompt once
Four images share a prompt, as candidates do. Writes benchmarks/results/scoring.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageFilter
from torch.nn import functional as F

from reward_models.clip_scorers import CLIPScorer
from reward_models.scoring import score_files

RESULTS = Path(__file__).parent / "results" / "scoring.json"
SIDES = (512, 640, 768, 896, 1024)


def make_images(folder: Path, count: int) -> list[Path]:
    """JPEGs as smooth and as large as photographs, of several shapes."""
    random = np.random.default_rng(0)
    files = []
    for k in range(count):
        width, height = (int(random.choice(SIDES)) for _ in range(2))
        small = Image.fromarray(random.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        image = small.resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.SHARPEN)
        files.append(folder / f"{k:05d}.jpg")
        image.save(files[-1], quality=92)
    return files


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


@torch.no_grad()
def forward(scorer: CLIPScorer, count: int, tokens: torch.Tensor, batch_size: int, device: torch.device) -> None:
    """The image tower on ready batches, and the text tower on the tokens [P, L] of the different prompts."""
    for part in tokens.split(batch_size):
        scorer.clip.encode_text(part).sum().item()
    pixels = torch.randn(batch_size, 3, scorer.rule.size, scorer.rule.size, device=device)
    for i in range(0, count, batch_size):
        scorer.clip.encode_image(pixels[: min(batch_size, count - i)]).sum().item()


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
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--model", help="open_clip architecture")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = args.model or ("ViT-H-14" if device.type == "cuda" else "ViT-B-32")
    torch.manual_seed(0)
    scorer = CLIPScorer(model).to(device).eval().requires_grad_(False)
    prompts = [f"a photograph of subject number {k // 4} in the evening light" for k in range(args.images)]
    tokens = open_clip.SimpleTokenizer()(list(dict.fromkeys(prompts))).to(device)
    with tempfile.TemporaryDirectory() as folder:
        files = make_images(Path(folder), args.images)
        baseline(scorer, files[:2], prompts[:2], device)  # warm
        theirs, their_mb = best_of_two(lambda: baseline(scorer, files, prompts, device))
        ours, our_mb = best_of_two(lambda: (scorer.forget(), score_files(scorer, files, prompts)))
    ready, _ = best_of_two(lambda: forward(scorer, args.images, tokens, args.batch_size, device))
    row = {
        "case": f"reward-score {model}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores {cpu()}",
        "ours": round(args.images / ours, 2),
        "baseline": round(args.images / theirs, 2),
        "ratio": round(theirs / ours, 2),
        "unit": "images/s",
        "peak_mb_ours": round(our_mb),
        "peak_mb_baseline": round(their_mb),
        "forward": round(args.images / ready, 2),
        "share_of_forward": round(ready / ours, 3),
        "images": args.images,
        "commit": commit(),
    }
    print(json.dumps(row, indent=1))
    RESULTS.with_suffix(".tmp").write_text(json.dumps([row], indent=1) + "\n")
    os.replace(RESULTS.with_suffix(".tmp"), RESULTS)


def cpu() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str:
    """The commit that is checked out, marked when the code differs from it."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
