"""Rounds of `diffalign iterate` on the playground: against fixed pairs, and curated retraining with fresh data.

    python benchmarks/iterate.py                     # both experiments, three seeds
    python benchmarks/iterate.py --arm rounds --arm fixed --seed 0

Arms `rounds`, `fixed` and `once` take the same number of Diffusion-DPO steps on pairs labelled by the shipped learned
scorer: `rounds` in three rounds on pairs of the last round's model, `fixed` in one round on as many pairs of the
shipped model from as much noise, `once` in one round on the first round's pairs alone, as iterative DPO is usually
compared. 3 x 100 steps of 16 pairs are near the length of the shipped recipe (400 steps), so that a fixed arm has time
to use up its pairs; `rounds` and `fixed` see each of their 3 x 256 pairs 6 times, `once` its 256 pairs 19 times.
Arms `curated-<share>` fine-tune on the best of eight images of a prompt by the exact judge, in three rounds of 200
steps from the last one's model, with this share of the base's own images, not chosen by anyone (curated retraining,
arXiv 2407.09499). A choice has to gain more than a model loses to its training data, which is .5 points for the base
itself: with winners of four drawn by Luce's choice, as the playground's people choose, the mean fell.

Writes results/iterate.json, one row for each arm, seed and round: the gain by the exact judge, which labels nothing in
the first three arms, and by the learned scorer, both in standard deviations; prompt match and diversity relative to the
base's. Prints the last round's difference of `rounds` and the fixed arms with 95 % t-intervals over seeds. What is in
the file is not run again; a killed arm goes on.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results_file import NUMBER, RESULTS, TEXT, WHOLE, commit, cpu, read_rows, write_rows
from scipy.stats import t

from diffalign.commands import program
from reward_models.files import read_json

FILE, WORK = RESULTS / "iterate.json", Path("runs") / "benchmark-iterate"
EXACT, LEARNED = "diffalign.playground:Judge", "playground_hps"
ROUNDS, STEPS, PROMPTS, SAMPLES = 3, 100, 256, 4
CURATED_STEPS, CURATED_SAMPLES = 200, 8
SHARES = (0.0, 0.25, 0.5)
FIXED = ("fixed", "once")
ARMS = ("rounds", *FIXED, *(f"curated-{share:g}" for share in SHARES))
SAMPLING = "--steps 10 --guidance 1 --size 32 --batch-size 64"
COLUMNS = {"arm": TEXT, "seed": WHOLE, "round": WHOLE, "exact": NUMBER, "learned": NUMBER, "diversity": NUMBER}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS, action="append", help="may be repeated; all")
    parser.add_argument("--seed", type=int, action="append", help="may be repeated; 0, 1, 2")
    args = parser.parse_args()
    rows = read_rows(FILE, COLUMNS)
    for seed in args.seed or (0, 1, 2):
        for arm in args.arm or ARMS:
            if not any(row["arm"] == arm and row["seed"] == seed for row in rows):
                rows += [
                    {"arm": arm, "seed": seed, **row, "device": cpu(), "commit": commit()} for row in _run(arm, seed)
                ]
                write_rows(FILE, sorted(rows, key=lambda row: (ARMS.index(row["arm"]), row["seed"], row["round"])))
    print(difference(rows))


def _run(arm: str, seed: int) -> list[dict[str, Any]]:
    """Rows of an arm. Its seeds of noise do not overlap with those of other seeds."""
    work, first = WORK / f"{arm}-{seed}", 100 * seed
    prompts, held_out = WORK / f"prompts-{seed}.jsonl", WORK / f"held_out-{seed}.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    _call("playground", "prompts", f"--n={PROMPTS}", f"--seed={seed}", f"--out={prompts}")
    _call("playground", "prompts", "--n=128", "--held-out", f"--seed={seed}", f"--out={held_out}")
    words = ["iterate", "playground", f"loop.folder={work / 'loop'}", f"loop.seed={first}", "loop.patience=99"]
    words += [f"generate.prompts={prompts}", f"evaluate.prompts={held_out}", "evaluate.samples_per_prompt=4"]
    steps = STEPS * ROUNDS if arm in FIXED else STEPS
    shipped = WORK / f"rounds-{seed}" / "loop"
    for part in ("base",) if arm.startswith("curated") else ("base", "round-1/images"):  # the shipped model's images
        if (shipped / part / "manifest.jsonl").exists() and not (work / "loop" / part).exists():
            shutil.copytree(shipped / part, work / "loop" / part)
    if arm in FIXED:
        words += ["loop.rounds=1"]
        if arm == "fixed":
            words += [f"loop.fresh={_pairs(work, prompts, first)}", f"loop.fresh_share={1 - 1 / ROUNDS}"]
    elif arm.startswith("curated"):
        share, steps = float(arm.partition("-")[2]), CURATED_STEPS
        words += ["train.recipe=sft", f"synthesize.scorers=[{EXACT}]", f"generate.samples_per_prompt={CURATED_SAMPLES}"]
        words += [f"evaluate.scorers=[{LEARNED},{EXACT}]"]
        words += [f"loop.fresh={_own(work, seed)}", f"loop.fresh_share={share}"] if share else []
    how = f"trainer.steps={steps} optimizer.lr_cosine_steps={steps} hooks.checkpoint_every=50 hooks.sample_every=0"
    _call(*words, f"train.options={how} hooks.verify_export=false")
    return [_row(one) for one in read_json(work / "loop" / "report" / "rounds.json")["rounds"]]


def _pairs(work: Path, prompts: Path, first: int) -> Path:
    """Pairs of the base from as much other noise as later rounds use."""
    lines = []
    for number in range(2, ROUNDS + 1):
        images, pairs = work / f"images-{number}", work / f"pairs-{number}.jsonl"
        words = ["--pipeline=playground", f"--prompts={prompts}", f"--seed={first + number}", f"--out={images}"]
        _call("generate", *words, f"--samples-per-prompt={SAMPLES}", *SAMPLING.split())
        _call("synthesize", str(images), f"--scorer={LEARNED}", f"--out={pairs}")
        lines += pairs.read_text().splitlines()
    (work / "others.jsonl").write_text("\n".join(lines) + "\n")
    return work / "others.jsonl"


def _own(work: Path, seed: int) -> Path:
    """The base's own images, as pairs whose winner is drawn by lot."""
    _call("playground", "unpack", "playground_own", "--n=1000", f"--out={work / 'own'}")
    lot = ["--labels=random", "--min-margin=0", f"--seed={seed}"]
    _call("playground", "label", str(work / "own"), *lot, f"--out={work / 'own.jsonl'}")
    return work / "own.jsonl"


def _call(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "diffalign", *words], check=True)


def _row(one: Mapping[str, Any]) -> dict[str, Any]:
    gains = {judge["name"]: judge["gain_sd"] for judge in one["judges"]}
    changes = {name: one[name] for name in ("match", "diversity")}
    return {"round": one["round"], "exact": gains[EXACT], "learned": gains[LEARNED], **changes}


def difference(rows: Sequence[Mapping[str, Any]]) -> str:
    """The gain of three rounds beyond that of the fixed arms, by both judges, with intervals over seeds."""
    last = {(row["arm"], row["seed"]): row for row in sorted(rows, key=lambda row: row["round"])}
    said = []
    for arm in FIXED:
        seeds = [seed for name, seed in last if name == "rounds" and (arm, seed) in last]
        if len(seeds) < 2:
            said.append(f"{len(seeds)} seeds of rounds and {arm}; an interval needs two")
            continue
        parts = []
        for judge in ("exact", "learned"):
            apart = np.array([last["rounds", seed][judge] - last[arm, seed][judge] for seed in seeds])
            half = t.ppf(0.975, len(apart) - 1) * apart.std(ddof=1) / len(apart) ** 0.5
            parts.append(f"{judge} judge: {apart.mean():+.2f} [{apart.mean() - half:+.2f}, {apart.mean() + half:+.2f}]")
        said.append(f"rounds minus {arm}, standard deviations, {len(seeds)} seeds: " + "; ".join(parts))
    return "\n".join(said)


if __name__ == "__main__":
    program.run(main)
