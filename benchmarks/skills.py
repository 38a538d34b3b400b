"""Skills learned apart and merged (SELMA): how much of each expert's gain the merged LoRA keeps.

    python benchmarks/skills.py                    # twenty minutes on one core; writes results/skills.json
    python benchmarks/skills.py --folder world     # keeps experts and images there, and goes on with them

Four LoRAs are trained by Diffusion-DPO on pairs of the playground base's own samples, each labelled by one aspect of
the exact judge: first on the pairs that differ most in it, then on pairs whose winners are no better or worse in the
other skills. `diffalign merge` makes their sum, their average, and a sum with weights chosen on validation prompts.
A gain is the change of an aspect's mean on test prompts, from the base's noise and without guidance. A share is the
gain of the merged LoRA over that of the expert; its interval is a bootstrap over prompts.
"""

from __future__ import annotations

import argparse
import runpy
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from leaderboard_rows import BASE
from leaderboard_world import SAMPLES, World
from numpy.typing import NDArray
from results_file import commit, cpu, write_rows
from torch import Tensor

from diffalign.commands import launch, program
from diffalign.playground import Judge
from diffalign.playground.annotators import load
from reward_models.accuracy import interval
from reward_models.files import write_lines

RESULTS = Path(__file__).parent / "results" / "skills.json"
SKILLS = {"colour": "vivid", "placement": "place", "cleanliness": "clean", "size": "area"}
"""The experts, and the aspect of the judge that labels their pairs. Larger objects are preferred in the last."""
PAIRS = 1000
"""Pairs of each expert: of the shipped ones, those that differ most in its aspect."""
STEPS = 200
COMMON = (0.5, 0.75, 1.0)
"""Weights that the search tries for all experts at once."""
ROUNDS = 4
"""How often it changes the best weights."""
LABELS = ("largest", "balanced")
"""Which pairs an expert is trained on; see the functions of these names."""

Means = dict[str, NDArray[np.float64]]
"""Mean of each skill's aspect over the images of each prompt, and `points` of the judge's true taste."""


def label(world: World, skill: str, labels: str) -> Path:
    """Pairs labelled by one skill only."""
    out = world.folder / f"{labels}-{skill}.jsonl"
    if not out.exists():
        folder = world.unpacked("own")
        rows, images = load(folder)
        found = Judge().measure(images, [row["prompt"] for row in rows])
        margins = torch.stack([found[aspect][::2] - found[aspect][1::2] for aspect in SKILLS.values()])
        number, lines = [*SKILLS].index(skill), []
        for i in (balanced if labels == "balanced" else largest)(margins / margins.std(1, keepdim=True), number):
            names = [str(Path("own") / rows[2 * i + k]["image"]) for k in (0, 1)]
            chosen, rejected = names if margins[number, i] > 0 else names[::-1]
            lines.append({"prompt": rows[2 * i]["prompt"], "chosen": chosen, "rejected": rejected})
        write_lines(out, lines)
    return out


def largest(margins: Tensor, number: int) -> list[int]:
    """The PAIRS pairs with the largest margin of a skill; margins [skills, pairs]."""
    return margins[number].abs().argsort(descending=True, stable=True)[:PAIRS].tolist()


def balanced(margins: Tensor, number: int) -> list[int]:
    """As `largest`, but the winners are on average neither better nor worse in the other skills.

    A pair is left out if it would move the winners' summed margins in the other skills away from 0.
    """
    sign, others = margins[number].sign(), [k for k in range(len(margins)) if k != number]
    total, chosen = torch.zeros(len(others)), list[int]()
    for i in margins[number].abs().argsort(descending=True, stable=True).tolist():
        after = total + sign[i] * margins[others, i]
        if after.norm() <= total.norm().clamp(min=3) and len(chosen) < PAIRS:
            total = after
            chosen.append(i)
    return chosen


def train(world: World, skill: str, labels: str) -> Path:
    """Export of the skill's expert."""
    run = world.folder / f"expert-{labels}-{skill}"
    if not (run / "export").exists():
        words = [f"data.path={label(world, skill, labels)}", f"data.cache={world.folder / 'cache'}", "data.limit=null"]
        words += [f"trainer.steps={STEPS}", f"optimizer.lr_cosine_steps={STEPS}", f"run.folder={run}"]
        words += ["hooks.sample_every=0", "hooks.checkpoint_every=0", "hooks.verify_export=false"]
        runpy.run_path(str(launch.find("train", "diffusion_dpo")))["main"](["--config=playground", *words])
    return run / "export"


def measured(world: World, prompts: str, out: str = "base", loras: Sequence[str] = ()) -> Means:
    """Aspects of the images of the base with these LoRAs."""
    samples = SAMPLES if prompts == "test" else 2
    folder = world.images(BASE, prompts, *(f"--lora={lora}" for lora in loras), out=out, samples=samples)
    rows, images = load(folder)
    texts = [row["prompt"] for row in rows]
    found = Judge().measure(images, texts)
    values = {skill: found[aspect] for skill, aspect in SKILLS.items()} | {"points": Judge().score(images, texts)}
    return {name: value.view(len(set(texts)), -1).mean(1).double().numpy() for name, value in values.items()}


def search(world: World, experts: Mapping[str, Path]) -> dict[str, float]:
    """Weights with the largest smallest share on validation prompts, of those tried.

    Common weights are tried first. Then the best weights are changed ROUNDS times, each divided by its skill's share.
    """
    base = measured(world, "validation")
    alone = {
        k: measured(world, "validation", path.parent.name, [str(path)])[k] - base[k] for k, path in experts.items()
    }
    tried: list[tuple[float, dict[str, float], dict[str, float]]] = []
    started: list[dict[str, float]] = []

    def share(weights: dict[str, float]) -> None:
        name = "-".join(f"{weight:g}" for weight in weights.values())
        found = measured(world, "validation", name, [f"{path}:{weights[k]:g}" for k, path in experts.items()])
        shares = {k: float((found[k] - base[k]).mean() / alone[k].mean()) for k in experts}
        print(f"validation, weights {name}:", *(f"{k} {x:.0%}" for k, x in shares.items()), flush=True)
        tried.append((min(shares.values()), weights, shares))

    for weight in COMMON:
        share(dict.fromkeys(experts, weight))
    for _ in range(ROUNDS):
        _, weights, shares = max(tried, key=lambda x: x[0])
        damped = 0.5 ** sum(start == weights for start in started)  # of a start that led to nothing better
        started.append(weights)
        step = {k: min(max(1 / max(x, 0.1), 0.7), 1.5) ** damped for k, x in shares.items()}
        share({k: round(weight * step[k], 3) for k, weight in weights.items()})
    return max(tried, key=lambda x: x[0])[1]


def merge(world: World, experts: Mapping[str, Path], name: str, out: Path, weights: Mapping[str, float]) -> Path:
    """LoRA of `diffalign merge`."""
    words = [f"{path}:{weights[k]:g}" for k, path in experts.items()] + [f"--model={BASE}", f"--out={out}"]
    words += ["--method=average"] if name == "average" else []
    if runpy.run_path(str(launch.find("tools", "merge")))["main"](words):
        raise RuntimeError(f"merging '{out}' failed")
    return out


def row(base: Means, found: Means, alone: Means) -> dict[str, Any]:
    """Gains with intervals, and shares of the experts' gains."""
    result: dict[str, Any] = {"gain": {}, "share": {}}
    for skill in base:
        gain = found[skill] - base[skill]
        result["gain"][skill] = estimate(gain.mean(), interval(gain))
        if skill in alone:
            own = alone[skill] - base[skill]
            result["share"][skill] = estimate(gain.mean() / own.mean(), interval(gain, own))
    return result


def estimate(value: float, ends: tuple[float, float]) -> list[float]:
    return [round(float(x), 4) for x in (value, *ends)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Shares of the experts' gains, and the gain in points of the judge's true taste."""
    lines = [f"{'pairs':<10}{'LoRA':<12}" + "".join(f"{k:>22}" for k in (*SKILLS, "points"))]
    for one in rows:
        cells = ["{:.0%} [{:.0%}, {:.0%}]".format(*one["share"][k]) for k in SKILLS]
        cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*one["gain"]["points"]))
        lines.append(f"{one['labels']:<10}{one['lora']:<12}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def run(world: World, labels: str) -> list[dict[str, Any]]:
    """Train, merge and measure; one row for each expert and each way to merge."""
    experts = {skill: train(world, skill, labels) for skill in SKILLS}
    base = measured(world, "test")
    found = {k: measured(world, "test", path.parent.name, [str(path)]) for k, path in experts.items()}
    alone = {k: found[k][k] for k in experts}
    ways = {"sum": dict.fromkeys(experts, 1.0), "average": dict.fromkeys(experts, 1.0)}
    if labels == "balanced":
        ways["weighted"] = search(world, experts)
    for name, weights in ways.items():
        lora = merge(world, experts, name, world.folder / f"merged-{labels}-{name}", weights)
        found[name] = measured(world, "test", lora.name, [str(lora)])
    about = {"labels": labels, "steps": STEPS, "pairs": PAIRS}
    return [
        {**about, "lora": name, "weights": ways.get(name), **row(base, means, alone)} for name, means in found.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        started = time.process_time()
        world = World(args.folder or Path(name))
        rows = [one for labels in LABELS for one in run(world, labels)]
        for one in rows:
            one |= {"seconds": round(time.process_time() - started), "cpu": cpu(), "commit": commit()}
        write_rows(RESULTS, rows)
        print(table(rows))


if __name__ == "__main__":
    program.run(main)
