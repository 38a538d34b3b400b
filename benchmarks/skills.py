"""Skills learned apart and merged (SELMA): how much of each expert's gain the merged LoRA keeps.

    python benchmarks/skills.py                    # ten minutes on one core; writes results/skills.json
    python benchmarks/skills.py --folder world     # keeps experts and images there, and goes on with them

Four LoRAs are trained by Diffusion-DPO on pairs of the playground base's own samples, each labelled by one aspect of
the exact judge. `diffalign merge` makes their sum, their average, and a sum with weights chosen on validation prompts.
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
from leaderboard_rows import BASE
from leaderboard_world import World
from numpy.typing import NDArray
from results_file import commit, cpu, write_rows

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
TUNED = (0.5, 0.75, 1.0, 1.25, 1.5)
"""Weights that the search tries for one expert at a time."""

Means = dict[str, NDArray[np.float64]]
"""Mean of each skill's aspect over the images of each prompt, and `points` of the judge's true taste."""


def label(world: World, skill: str) -> Path:
    """Pairs labelled by one skill only."""
    out = world.folder / f"{skill}.jsonl"
    if not out.exists():
        folder = world.unpacked("own")
        rows, images = load(folder)
        measured = Judge().measure(images, [row["prompt"] for row in rows])[SKILLS[skill]]
        margin = measured[::2] - measured[1::2]
        lines = []
        for i in margin.abs().argsort(descending=True, stable=True)[:PAIRS].tolist():
            names = [str(Path("own") / rows[2 * i + k]["image"]) for k in (0, 1)]
            chosen, rejected = names if margin[i] > 0 else names[::-1]
            lines.append({"prompt": rows[2 * i]["prompt"], "chosen": chosen, "rejected": rejected})
        write_lines(out, lines)
    return out


def train(world: World, skill: str) -> Path:
    """Export of the skill's expert."""
    run = world.folder / f"expert-{skill}"
    if not (run / "export").exists():
        words = [f"data.path={label(world, skill)}", f"data.cache={world.folder / 'cache'}", "data.limit=null"]
        words += [f"trainer.steps={STEPS}", f"optimizer.lr_cosine_steps={STEPS}", f"run.folder={run}"]
        words += ["hooks.sample_every=0", "hooks.checkpoint_every=0", "hooks.verify_export=false"]
        runpy.run_path(str(launch.find("train", "diffusion_dpo")))["main"](["--config=playground", *words])
    return run / "export"


def measured(world: World, prompts: str, out: str = "base", loras: Sequence[str] = ()) -> Means:
    """Aspects of the images of the base with these LoRAs."""
    folder = world.images(BASE, prompts, *(f"--lora={lora}" for lora in loras), out=out)
    rows, images = load(folder)
    texts = [row["prompt"] for row in rows]
    found = Judge().measure(images, texts)
    values = {skill: found[aspect] for skill, aspect in SKILLS.items()} | {"points": Judge().score(images, texts)}
    return {name: value.view(len(set(texts)), -1).mean(1).double().numpy() for name, value in values.items()}


def search(world: World, experts: Mapping[str, Path]) -> dict[str, float]:
    """Weights with the largest smallest share on validation prompts: one weight changed at a time, once each.

    It starts from the best common weight of `TUNED` and of the average.
    """
    base = measured(world, "validation")
    alone = {k: measured(world, "validation", f"expert-{k}", [str(path)])[k] - base[k] for k, path in experts.items()}

    def smallest(weights: Mapping[str, float]) -> float:
        name = "-".join(f"{weight:g}" for weight in weights.values())
        found = measured(world, "validation", name, [f"{path}:{weights[k]:g}" for k, path in experts.items()])
        shares = {k: (found[k] - base[k]).mean() / alone[k].mean() for k in experts}
        print(f"validation, weights {name}:", *(f"{k} {share:.0%}" for k, share in shares.items()), flush=True)
        return min(shares.values())

    weights = max((dict.fromkeys(experts, w) for w in (1 / len(experts), *TUNED)), key=smallest)
    for skill in experts:
        weights = max(({**weights, skill: w} for w in dict.fromkeys((weights[skill], *TUNED))), key=smallest)
    return weights


def merge(world: World, experts: Mapping[str, Path], name: str, weights: Mapping[str, float]) -> Path:
    """LoRA of `diffalign merge`."""
    out = world.folder / f"merged-{name}"
    words = [f"{path}:{weights[k]:g}" for k, path in experts.items()] + [f"--model={BASE}", f"--out={out}"]
    words += ["--method=average"] if name == "average" else []
    if runpy.run_path(str(launch.find("tools", "merge")))["main"](words):
        raise RuntimeError(f"merging '{out}' failed")
    return out


def row(name: str, base: Means, found: Means, alone: Means) -> dict[str, Any]:
    """Gains with intervals, and shares of the experts' gains."""
    result: dict[str, Any] = {"lora": name, "gain": {}, "share": {}}
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
    """The results in words."""
    lines = [f"{'LoRA':<14}" + "".join(f"{k:>24}" for k in (*SKILLS, "points of the judge"))]
    for one in rows:
        cells = ["{:.0%} [{:.0%}, {:.0%}]".format(*one["share"][k]) for k in SKILLS]
        cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*one["gain"]["points"]))
        lines.append(f"{one['lora']:<14}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def run(world: World) -> list[dict[str, Any]]:
    """Train, merge and measure; one row for each expert and each way to merge."""
    experts = {skill: train(world, skill) for skill in SKILLS}
    base = measured(world, "test")
    found = {k: measured(world, "test", f"expert-{k}", [str(path)]) for k, path in experts.items()}
    alone = {k: found[k][k] for k in experts}
    ways = {"sum": dict.fromkeys(experts, 1.0), "average": dict.fromkeys(experts, 1.0)}
    ways["weighted"] = search(world, experts)
    for name, weights in ways.items():
        found[name] = measured(world, "test", f"merged-{name}", [str(merge(world, experts, name, weights))])
    rows = [row(name, base, means, alone) for name, means in found.items()]
    for one in rows:
        one |= {"weights": ways.get(one["lora"]), "steps": STEPS, "pairs": PAIRS}
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        started = time.process_time()
        rows = run(World(args.folder or Path(name)))
        for one in rows:
            one |= {"seconds": round(time.process_time() - started), "cpu": cpu(), "commit": commit()}
        write_rows(RESULTS, rows)
        print(table(rows))


if __name__ == "__main__":
    program.run(main)
