"""`diffalign demo`: the five-minute story, told with the public commands that a user would type."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path

from diffalign.commands import launch
from reward_models.files import read_json, write_whole

SAMPLING = "--samples-per-prompt 2 --steps 10 --guidance 2.0 --size 32 --batch-size 64"
STORY = f"""
# Captions of a small world; the model has seen every combination of these attributes.
diffalign playground prompts --n 320 --out OUT/prompts.jsonl
# Two images for each, from the shipped 1.3 M parameter Stable Diffusion.
diffalign generate --pipeline playground --prompts OUT/prompts.jsonl {SAMPLING} --seed 1 --out OUT/images
# Simulated people choose. They like vivid colours and objects in their place, and they err.
diffalign playground label OUT/images --out OUT/pairs.jsonl
# Align with Diffusion-DPO: a LoRA, its reference is the same U-Net with the adapters off.
diffalign train --num-processes 1 diffusion_dpo --config playground \
    run.folder=OUT/run data.path=OUT/pairs.jsonl data.cache=OUT/cache trainer.steps=100
# Captions whose combination of colour, shape and background the model has never seen.
diffalign playground prompts --n 128 --held-out --out OUT/held_out.jsonl
# The same prompts and the same noise for the base model ...
diffalign generate --pipeline playground --prompts OUT/held_out.jsonl {SAMPLING} --out OUT/base
# ... and for the aligned one, loaded by stock diffusers.
diffalign generate --pipeline playground --lora OUT/run/export --prompts OUT/held_out.jsonl {SAMPLING} \
    --out OUT/aligned
# Which do people prefer? An exact judge measures it in the pixels.
diffalign eval win_rate OUT/base OUT/aligned --scorer diffalign.playground:Judge --out OUT/win_rate.json
# A report that opens from disk.
diffalign eval report --base OUT/base --aligned OUT/aligned --win-rate OUT/win_rate.json --run OUT/run --out OUT/report
"""
"""What the demo runs, on a GPU where there is one; OUT stands for its folder."""


def demo(out: Path) -> int:
    """Pairs from the shipped model, simulated labels, Diffusion-DPO with a LoRA, win rate on held-out prompts, report.

    Writes everything under `out`, `out/summary.json` last. Returns the exit code of the first command that fails, or 0.
    """
    started = time.time()
    if (out / "run" / "config.yaml").exists():
        raise FileExistsError(f"'{out}' already holds a demo; choose another --out or delete it")
    out.mkdir(parents=True, exist_ok=True)
    # Offline, and without the libraries' progress bars for a dozen tiny files; ours stay.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for line in STORY.strip().splitlines():
        if line.startswith("#"):
            print(f"\n{line}", flush=True)
            continue
        words = [word.replace("OUT/", f"{out}{os.sep}") for word in line.split()]
        print(f"$ {shlex.join(words)}", flush=True)
        command = [sys.executable, "-m", "diffalign", *words[1:]]
        code = launch.call(command, environment)
        if code:
            print(f"diffalign demo: this command failed with exit code {code}", file=sys.stderr)
            return code
    return _summary(out, time.time() - started)


def _summary(out: Path, seconds: float) -> int:
    result = read_json(out / "win_rate.json")["scorers"][0]
    keys = {"win_rate": "win_rate", "win_rate_low": "low", "win_rate_high": "high", "n": "n"}
    summary = {ours: result[theirs] for ours, theirs in keys.items()}
    summary |= {"seconds": round(seconds, 1), "export": str(out / "run" / "export")}
    write_whole(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(
        f"\nThe aligned model wins {summary['win_rate']:.1%} of {summary['n']} held-out comparisons "
        f"(95 % interval {summary['win_rate_low']:.1%} to {summary['win_rate_high']:.1%}), in {seconds:.0f} s.\n"
        f"Report: {(out / 'report' / 'index.html').resolve()}\n"
        f"In your own code: pipe.load_lora_weights('{summary['export']}')"
    )
    return 0
