"""Kill programs at random moments, resume them, and compare their output with that of an undisturbed run.

    python benchmarks/interruptions.py                     # 20 of each signal; writes results/interruptions.json
    python benchmarks/interruptions.py --trials 5 --seed 3 --only training

SIGKILL, SIGTERM and SIGINT are sent at a time drawn uniformly from the duration of the program: offline and online
training, caching of latents, scoring, generating, all on the playground. A trial passes if the program exits as
required, the same command resumes it, and all output is the same bit for bit: weights, moving averages, checkpoints,
metrics (one line per step, in order), sample grids, tables, images. Nothing in the cache may be computed again. Each
program runs in its own process, forked after the imports, which take most of the time.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import accelerate  # noqa: F401
import peft  # noqa: F401
from diffusers import StableDiffusionPipeline  # noqa: F401

import reward_models.clip.scorers  # noqa: F401
from diffalign.commands import launch
from diffalign.playground.world import captions
from reward_models.files import write_whole

RESULTS = Path(__file__).parent / "results" / "interruptions.json"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
GRID = ["hooks.sample_prompts=[small red circle on white]", "hooks.sample_steps=2", "hooks.verify_export=false"]
STEPS = {"training, offline": 18, "training, online": 8, "caching": 2}


class Job(NamedTuple):
    """A program: its first call, the arguments added to resume, and the number of steps in its metrics."""

    name: str
    words: tuple[str, ...]
    again: tuple[str, ...] = ()
    cache: str = ""  # cache of latents; empty for its own


def jobs(scratch: Path) -> list[Job]:
    """Programs to interrupt; OUT in their arguments is the folder of a trial."""
    prompts, images = scratch / "prompts.txt", scratch / "whole-generating" / "images"
    prompts.write_text("\n".join(captions(24, held_out=True)) + "\n")
    dpo = [str(launch.find("train", "diffusion_dpo")), "--config=playground", "run.folder=OUT", *GRID]
    dpo += ["data.batch_size=8", "hooks.ema_decay=0.9"]
    online = [str(launch.find("train", "diff_instruct_star")), "--config=playground", "run.folder=OUT", *GRID]
    online += ["data.batch_size=4", "data.limit=32", "algorithm.aux_rounds=1", "reward.normalise=running"]
    online += ["monitor.every=3", "monitor.prompt_count=4", "hooks.checkpoint_every=3", "hooks.sample_every=2"]
    offline = ["data.limit=64", "hooks.checkpoint_every=5", "hooks.sample_every=4", "run.log_every=4"]
    caching = ["data.limit=1000", "hooks.sample_every=0", "data.draws_per_sample=1"]
    generate = [str(launch.find("tools", "generate")), "--pipeline", "playground", "--prompts", str(prompts)]
    generate += ["--steps", "3", "--batch-size", "4", "--samples-per-prompt", "4", "--out", "OUT/images"]
    score = [
        str(launch.find("eval", "score_folder")),
        str(images),
        "--scorer",
        "playground_vp_score",
        "--batch-size",
        "2",
    ]
    steps = {name: f"trainer.steps={n}" for name, n in STEPS.items()}
    resume = ("run.resume=true",)
    return [
        Job("training, offline", (*dpo, *offline, steps["training, offline"]), resume, str(scratch / "cache")),
        Job("training, online", (*online, steps["training, online"]), resume, str(scratch / "cache")),
        Job("caching", (*dpo, *caching, steps["caching"]), resume),
        Job("generating", tuple(generate)),
        Job("scoring", (*score, "--batch-size", "2", "--out", "OUT/scores.csv"), ("--resume",)),
    ]


def start(job: Job, out: Path, more: Sequence[str] = ()) -> int:
    """Fork a process that runs the program as `python PROGRAM WORDS` would; returns its id."""
    out.mkdir(exist_ok=True)
    sys.stdout.flush()
    if child := os.fork():
        return child
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["DIFFALIGN_CACHE"] = job.cache or str(out.with_suffix(".cache"))
    sys.argv = [word.replace("OUT", str(out)) for word in (*job.words, *more)]
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:  # exit as the interpreter does
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # never return into the parent's code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """Exit code of a process, -n if signal n ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def written(job: Job, out: Path) -> dict[str, str]:
    """Output of the program, name -> hash; metrics without speeds, and only the last checkpoint."""
    found = {}
    for file in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(file.relative_to(out))
        data = file.read_bytes()
        if name.endswith("metrics.jsonl"):
            rows = [json.loads(line) for line in data.splitlines()]
            data = json.dumps([{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]).encode()
        if name.endswith(".safetensors"):  # safetensors writes its metadata in random order
            end = 8 + int.from_bytes(data[:8], "little")
            data = json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]
        kept = name.startswith(("export/", "samples/", "images/", f"checkpoints/step-{STEPS.get(job.name, 0):06d}"))
        same = ("random_states", "checksums", "settings.json")  # pickled objects, their hashes, and paths
        if (kept or name in ("metrics.jsonl", "scores.csv", "dropped.jsonl")) and not any(x in name for x in same):
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def cached(job: Job, out: Path) -> dict[str, tuple[int, int]]:
    """Files of the program's cache, with sizes and modification times."""
    files = out.with_suffix(".cache").rglob("*.safetensors") if not job.cache else ()
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


def steps_of(out: Path) -> list[int]:
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def trial(job: Job, signum: int, out: Path, seconds: float, moments: random.Random, whole: dict[str, str]) -> dict:
    """Interrupt, resume and compare; returns the row of the trial. A time after the end is drawn again."""
    for attempt in itertools.count():
        here = out.with_name(f"{out.name}-{attempt}")
        moment = moments.uniform(0, seconds)
        child = start(job, here)
        time.sleep(moment)
        if os.waitpid(child, os.WNOHANG)[0]:
            continue
        os.kill(child, signum)
        sent = time.perf_counter()
        if code := wait(child):  # otherwise the program had finished
            break
    row = {"job": job.name, "signal": signal.Signals(signum).name, "moment": round(moment, 2), "exit": code}
    row["seconds to end"] = round(time.perf_counter() - sent, 2)
    row["steps before"], kept = len([s for s in steps_of(here) if s]), cached(job, here)
    row["ended as asked"] = code in ((-signum, 128 + signum) if signum != signal.SIGKILL else (-signum,))
    if code == 128 + signum and job.name in STEPS and row["steps before"]:
        newest = max((here / "checkpoints").glob("step-*/state.json")).parent.name
        row["ended as asked"] &= newest == f"step-{row['steps before']:06d}"
    row["went on"] = wait(start(job, here, job.again)) == 0
    found = written(job, here)
    row["differs"] = sorted(k for k in whole.keys() | found.keys() if whole.get(k) != found.get(k))
    first = 0 if job.name == "training, online" else 1  # the monitor measures before the first step
    row["in order"] = steps_of(here) == list(range(first, STEPS[job.name] + 1)) if job.name in STEPS else True
    row["cache kept"] = kept.items() <= cached(job, here).items()
    row["holds"] = row["ended as asked"] and row["went on"] and not row["differs"] and row["in order"]
    row["holds"] &= row["cache kept"]
    return row


def table(rows: Sequence[dict]) -> list[dict]:
    """Table with a line per program and signal."""
    lines = []
    for job, name in dict.fromkeys((row["job"], row["signal"]) for row in rows):
        some = [row for row in rows if (row["job"], row["signal"]) == (job, name)]
        line = {"program": job, "signal": name, "trials": len(some)}
        line |= {key: sum(row[key] for row in some) for key in ("ended as asked", "went on", "in order", "cache kept")}
        line["bit for bit"] = sum(not row["differs"] for row in some)
        line["slowest end"] = max(row["seconds to end"] for row in some)
        line |= {key: [row[key] for row in some] for key in ("moment", "exit", "steps before")}
        lines.append({**line, "holds": sum(row["holds"] for row in some)})
    return lines


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, one thread a program"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trials", type=int, default=20, help="number of trials per signal, distributed over the programs"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times")
    parser.add_argument("--only", default="", help="programs with this name prefix; nothing is written then")
    parser.add_argument("--folder", type=Path, help="folder to keep all files in")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    begun = time.time()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (args.folder or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        seconds, rows = trials(scratch, args.trials, random.Random(args.seed), args.only)
    lines, holds = table(rows), sum(row["holds"] for row in rows)
    for line in [dict(zip(lines[0], lines[0], strict=True)), dict.fromkeys(lines[0], "---"), *lines]:
        print("| " + " | ".join(str(value) for value in line.values()) + " |")
    print(f"\n{holds} of {len(rows)} trials hold")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    said = {"machine": machine(), "commit": commit.stdout.strip(), "seed": args.seed}
    said |= {"seconds": round(time.time() - begun), "seconds undisturbed": seconds}
    said |= {"trials": len(rows), "hold": holds}
    if not args.only:
        text = json.dumps(said, indent=1).removesuffix("\n}") + ',\n "rows": [\n'
        write_whole(RESULTS, text + ",\n".join(map(json.dumps, lines)) + "\n ]\n}\n")
    return int(holds < len(rows))


def trials(scratch: Path, n: int, moments: random.Random, only: str) -> tuple[dict[str, float], list[dict]]:
    """Run every program without interruption, with its duration; then n trials per signal. Returns the rows."""
    programs, whole, seconds = jobs(scratch), {}, {}
    for job in programs:
        out = scratch / f"whole-{job.name.replace(', ', '-')}"
        for _ in range(1 + bool(job.cache)):  # the second run uses the cache, as the trials do
            shutil.rmtree(out, ignore_errors=True)
            started = time.perf_counter()
            if code := wait(start(job, out)):
                sys.exit(f"{job.name} fails with {code}:\n{out.with_suffix('.log').read_text()}")
            seconds[job.name] = round(time.perf_counter() - started, 1)
        whole[job.name] = written(job, out)
        print(f"{job.name}: {seconds[job.name]} s, {len(whole[job.name])} files", flush=True)
    chosen, rows = [job for job in programs if job.name.startswith(only)], []
    for k, signum in itertools.product(range(n), SIGNALS):
        job, out = chosen[k % len(chosen)], scratch / f"{signum.name}-{k}"
        rows.append(trial(job, signum, out, seconds[job.name], moments, whole[job.name]))
        print(json.dumps(rows[-1]), flush=True)
    return seconds, sorted(rows, key=lambda row: (row["job"], row["signal"]))


if __name__ == "__main__":
    sys.exit(main())
