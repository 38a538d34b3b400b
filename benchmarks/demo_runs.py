"""`diffalign demo` with three seeds, each with the control run on random labels.

    python benchmarks/demo_runs.py                # half an hour on two cores
    python benchmarks/demo_runs.py --seed 0

Writes results/demo.json, one summary a seed, and docs/demo.png, the grid of seed 0, which README shows: held-out
prompts, the base's image above the aligned one from the same noise.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from results_file import RESULTS, ROOT, WHOLE, commit, cpu, read_rows, write_rows

from diffalign.commands import program
from reward_models.files import read_json

GRID, FILE = ROOT / "docs" / "demo.png", RESULTS / "demo.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, action="append", help="may be repeated; 0, 1, 2")
    args = parser.parse_args()
    rows = read_rows(FILE, {"seed": WHOLE})
    for seed in args.seed or (0, 1, 2):
        with tempfile.TemporaryDirectory() as name:
            out = Path(name, "demo")
            words = [sys.executable, "-m", "diffalign", "demo", "--random-labels", f"--seed={seed}", f"--out={out}"]
            subprocess.run(words, check=True)
            summary = read_json(out / "summary.json")
            if seed == 0:
                shutil.copy(summary["grid"], GRID)
        row = {"seed": seed, **{k: v for k, v in summary.items() if k not in ("export", "grid")}}
        rows = [r for r in rows if r["seed"] != seed] + [row | {"device": cpu(), "commit": commit()}]
        write_rows(FILE, sorted(rows, key=lambda r: r["seed"]))


if __name__ == "__main__":
    program.run(main)
