"""`diffalign demo`: the five-minute story, told with the public commands that a user would type."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from diffalign import launch

PROMPTS, TRAIN_STEPS, HELD_OUT = 384, 160, 128
SAMPLING = ["--steps", "10", "--guidance", "2.0", "--size", "32", "--batch-size", "64"]


def demo(out: Path) -> int:
    """Pairs from the shipped model, simulated labels, Diffusion-DPO with a LoRA, win rate on held-out prompts, report.

    Writes everything under `out`, `out/summary.json` last. Returns the exit code of the first command that fails, or 0.
    """
    started = time.time()
    if (out / "run" / "config.yaml").exists():
        raise FileExistsError(f"'{out}' already holds a demo; choose another --out or delete it")
    out.mkdir(parents=True, exist_ok=True)
    cli = [sys.executable, "-m", "diffalign.cli"]
    cpu = launch.ROOT / "configs" / "accelerate" / "cpu.yaml"
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(cpu)]
    generate = [*cli, "eval", "generate", "--pipeline", "playground", *SAMPLING]
    base, aligned, held_out = f"{out}/base", f"{out}/aligned", f"{out}/held_out.jsonl"
    story = [
        (
            "Captions of a small world; the model has seen every combination of these attributes.",
            [*cli, "playground", "prompts", "--n", str(PROMPTS), "--out", f"{out}/prompts.jsonl"],
        ),
        (
            "Two images for each, from the shipped 1.3 M parameter Stable Diffusion.",
            [*generate, "--prompts", f"{out}/prompts.jsonl", "--samples-per-prompt", "2", "--seed", "1", "--out", f"{out}/images"],
        ),
        (
            "Simulated people choose. They like vivid colours and objects in their place, and they err.",
            [*cli, "playground", "label", f"{out}/images", "--out", f"{out}/pairs.jsonl"],
        ),
        (
            "Align with Diffusion-DPO: a LoRA, its reference is the same U-Net with the adapters off.",
            [*accelerate, str(launch.find("train", "diffusion_dpo")), "--config", "playground"]
            + [f"run.folder={out}/run", f"data.path={out}/pairs.jsonl", f"trainer.steps={TRAIN_STEPS}"]
            + [f"data.cache={out}/cache"],
        ),
        (
            "Captions whose combination of colour, shape and background the model has never seen.",
            [*cli, "playground", "prompts", "--n", str(HELD_OUT), "--held-out", "--out", held_out],
        ),
        (
            "The same prompts and the same noise for the base model ...",
            [*generate, "--prompts", held_out, "--samples-per-prompt", "2", "--out", base],
        ),
        (
            "... and for the aligned one, loaded by stock diffusers.",
            [*generate, "--prompts", held_out, "--samples-per-prompt", "2", "--lora", f"{out}/run/export", "--out", aligned],
        ),
        (
            "Which do people prefer? An exact judge measures it in the pixels.",
            [*cli, "eval", "win_rate", base, aligned, "--scorer", "diffalign.playground:Judge", "--out", f"{out}/win_rate.json"],
        ),
        (
            "A report that opens from disk.",
            [*cli, "eval", "report", "--base", base, "--aligned", aligned, "--win-rate", f"{out}/win_rate.json"]
            + ["--run", f"{out}/run", "--out", f"{out}/report"],
        ),
    ]  # fmt: skip
    for line, command in story:
        print(f"\n# {line}\n$ {_shown(command)}", flush=True)
        code = subprocess.run(command, check=False, env=_quiet()).returncode
        if code:
            print(f"diffalign demo: this command failed with exit code {code}", file=sys.stderr)
            return code
    return _summary(out, time.time() - started)


def _summary(out: Path, seconds: float) -> int:
    result = json.loads((out / "win_rate.json").read_text())["scorers"][0]
    keys = {"win_rate": "win_rate", "win_rate_low": "low", "win_rate_high": "high", "n": "n"}
    summary = {ours: result[theirs] for ours, theirs in keys.items()}
    summary |= {"seconds": round(seconds, 1), "export": str(out / "run" / "export")}
    temporary = out / "summary.json.tmp"
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(temporary, out / "summary.json")
    print(
        f"\nThe aligned model wins {summary['win_rate']:.1%} of {summary['n']} held-out comparisons "
        f"(95 % interval {summary['win_rate_low']:.1%} to {summary['win_rate_high']:.1%}), in {seconds:.0f} s.\n"
        f"Report: {(out / 'report' / 'index.html').resolve()}\n"
        f"In your own code: pipe.load_lora_weights('{summary['export']}')"
    )
    return 0


def _shown(command: list[str]) -> str:
    """The command as a user would type it."""
    words = command[1:]
    words = ["diffalign", *words[2:]] if words[1] == "diffalign.cli" else ["accelerate", *words[2:]]
    here = f"{launch.ROOT}{os.sep}"
    return shlex.join(w.removeprefix(here) for w in words)


def _quiet() -> dict[str, str]:
    """The environment without progress bars for a dozen tiny files; ours stay."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
