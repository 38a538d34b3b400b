"""Peak memory of `reward-score` against the number of images: lists, tar shards and parquet files.

    python benchmarks/scoring_memory.py                    # 200,000 images; minutes for each kind of input
    python benchmarks/scoring_memory.py --images 2000 20000

Memory is measured, not speed. So images are PNG files of 8 pixels (64 different ones), and the scorer is a CLIP of one
narrow layer with random weights: all that is held for an image or a prompt is there, the networks take no time. Four
images share a prompt. Each run is a process of its own on the CPU. Writes benchmarks/results/scoring_memory.json;
peak_mb is the peak of the process (resident memory), of which torch takes most, and images_per_cpu_second counts the
whole command.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from results_file import RESULTS, ROOT, commit, cpu, write_rows

from reward_models.clip.scorers import CLIPScorer
from reward_models.playground import PLAYGROUND, hps

SHARD = 10_000
COMMAND = """
import resource, sys, time
from reward_models.folder.cli import main
started = time.process_time()
assert main(sys.argv[1:]) == 0
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.process_time() - started)
"""
SIDE = 8
"""Pixels of an image."""


def pictures() -> list[bytes]:
    """Some encoded images, all different."""
    random, found = np.random.default_rng(0), []
    for _ in range(64):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(file, "PNG")
        found.append(file.getvalue())
    return found


def save_scorer(folder: Path) -> None:
    """Write a scorer of the playground scorer's kind and tokenizer with one layer of each tower."""
    model = deepcopy(hps().architecture)
    model["vision_cfg"] |= {"image_size": SIDE, "patch_size": SIDE, "width": 16, "layers": 1}
    model["text_cfg"] |= {"width": 16, "heads": 1, "layers": 1}
    CLIPScorer(model, tokenizer=str(PLAYGROUND / "hps")).save(folder)


def prompt(i: int) -> str:
    return f"small red circle number {i // 4} at the top left of a white square"


def make(kind: str, folder: Path, count: int) -> Path:
    """The input of a run."""
    data = pictures()
    if kind == "list":
        for k, picture in enumerate(data):
            (folder / f"{k}.png").write_bytes(picture)
        with (folder / "list.jsonl").open("w") as file:
            for i in range(count):
                name = f"images/{i // 1000:05d}/{i:07d}.png"
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(folder / f"{i % 64}.png", folder / name)
                file.write(json.dumps({"image": name, "prompt": prompt(i)}) + "\n")
        return folder / "list.jsonl"
    for start in range(0, count, SHARD):
        mine = range(start, min(start + SHARD, count))
        if kind == "tar":
            with tarfile.open(folder / f"{start:07d}.tar", "w") as tar:
                for i in mine:
                    for name, content in ((f"{i:07d}.png", data[i % 64]), (f"{i:07d}.txt", prompt(i).encode())):
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        else:
            cells = [{"bytes": data[i % 64], "path": f"{i:07d}.png"} for i in mine]
            table = pa.table({"image": cells, "prompt": [prompt(i) for i in mine]})
            pq.write_table(table, folder / f"{start:07d}.parquet", row_group_size=1000)
    return folder


def measure(kind: str, count: int, folder: Path) -> dict[str, Any]:
    """A run in a process of its own: peak memory, and images for each second of the processor."""
    (folder / "input").mkdir()
    save_scorer(folder / "scorer")
    source, out = make(kind, folder / "input", count), folder / "scores.csv"
    words = [str(source), "--scorer", str(folder / "scorer"), "--device", "cpu", "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMMAND, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True)
    peak, seconds = map(float, done.stdout.splitlines()[-1].split()[1:])
    return {"input": kind, "images": count, "peak_mb": round(peak), "images_per_cpu_second": round(count / seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[2_000, 200_000])
    parser.add_argument("--kind", nargs="+", choices=("list", "tar", "parquet"), default=("list", "tar", "parquet"))
    args = parser.parse_args()
    rows = []
    for kind in args.kind:
        for count in args.images:
            with tempfile.TemporaryDirectory() as name:
                rows.append({**measure(kind, count, Path(name)), "device": cpu(), "commit": commit()})
            print(json.dumps(rows[-1]), flush=True)
    write_rows(RESULTS / "scoring_memory.json", rows)


if __name__ == "__main__":
    main()
