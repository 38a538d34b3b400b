"""The planner's predictions against peaks measured on a GPU, for the training cases of results/gpu.json. No GPU needed.

    python benchmarks/plans.py                        # all cases that were measured
    python benchmarks/plans.py --only sd15-lora-8     # some of them; the rows of the others stay

Models are those of benchmarks/gpu.py, from their configs alone. A prediction is what torch's allocator will hold: the
context of the device is not in it, as it is not in the measured peaks. Writes results/plans.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu import CASES, Case
from gpu_cases import ENDLESS, QUIET
from random_models import SIZES, make_pipeline, playground_pairs
from results_file import RESULTS, TEXT, commit, read_rows, write_rows

from diffalign.commands import launch
from diffalign.commands.planning import GB, plan
from diffalign.playground.world import captions

PREPARED = ("pairs", "algorithm")


def config_folder(size: str, folder: Path) -> Path:
    """A diffusers folder of a size in SIZES, without weights."""
    parts = make_pipeline(SIZES[size], torch.device("meta"))
    parts.save_config(folder)
    for name, part in parts.components.items():
        if hasattr(part, "save_config"):
            part.save_config(folder / name)
        elif part is not None:
            (part if "tokenizer" in name else part.config).save_pretrained(folder / name)
    return folder


def arguments(case: Case, model: Path, scratch: Path) -> tuple[str, list[str]]:
    """Recipe and command line of a case, as benchmarks/gpu_cases.py has them."""
    settings: dict[str, Any] = dict(case.settings)
    size, resolution = settings["size"], SIZES[settings["size"]].resolution
    words = [x.format(pipeline=model) for x in settings.get("more", ())]
    if case.run == "pairs":
        words = [
            f"data.draws_per_sample={2 if size == 'sd15' else 1}",
            f"backbone.lora_rank={settings['rank']}",
            *words,
        ]
    name = settings.get("name", "diffusion_dpo")
    online = name not in ("diffusion_dpo", "inpo")
    if online:
        data = scratch / "prompts.txt"
        data.write_text("\n".join(captions(16, held_out=False)))
        words += ["reward.scorers=[random_models:vit_h]", "reward.dtype=bf16"]
    else:
        data = playground_pairs(scratch / "pairs", 64, 8)
    quiet = QUIET if online else QUIET[:-1]
    here = [f"backbone.path={model}", f"data.path={data}", f"data.batch_size={settings['batch']}"]
    return name, [f"--config={settings['config']}", *quiet, *ENDLESS, *here, f"data.resolution={resolution}", *words]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of cases of benchmarks/gpu.py")
    parser.add_argument("--out", type=Path, default=RESULTS / "plans.json")
    args = parser.parse_args(argv)
    measured = {row["case"]: row.get("peak_gb_ours") for row in json.loads((RESULTS / "gpu.json").read_text())}
    rows = read_rows(args.out, {"case": TEXT}) if args.only else []
    encoded: set[str] = set()
    for key, case in CASES.items():
        wanted = key in args.only if args.only else measured.get(case.title) and case.settings.get("compiled") is None
        size = case.settings.get("size", "")
        cached, kind = f"{size} {case.run}" in encoded, case.run
        encoded.add(f"{size} {kind}")
        if not wanted or kind not in PREPARED:
            continue
        with tempfile.TemporaryDirectory() as name:
            scratch, started = Path(name), time.process_time()
            recipe, words = arguments(case, config_folder(case.settings["size"], scratch / "model"), scratch)
            row: dict[str, Any] = {"case": case.title, "measured_gb": measured.get(case.title)}
            try:
                found = plan(launch.find("train", recipe), words)
            except Exception as error:
                row |= {"error": f"{type(error).__name__}: {error}"[:200]}
            else:
                phases = {name: round(peak.bytes / GB, 2) for name, peak in found.peaks.items()}
                most = max(gb for name, gb in phases.items() if name != "encoding" or not cached)
                row |= {"planned_gb": most, "phases": phases, "encoded_before": cached}
                if row["measured_gb"]:
                    row["off"] = round(most / row["measured_gb"] - 1, 3)
                row |= {"cpu_s": round(time.process_time() - started, 1), "commit": commit()}
        rows = [other for other in rows if other["case"] != case.title] + [row]
        print(json.dumps(row), file=sys.stderr)
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()
