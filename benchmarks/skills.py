"""Skills learned apart and merged (SELMA): how much of each expert's gain the merged LoRA keeps.

    python benchmarks/skills.py                    # fifteen minutes on one core; writes results/skills.json
    python benchmarks/skills.py --folder world     # keeps experts and images there, and goes on with them

Five LoRAs are trained by Diffusion-DPO on pairs of the playground base's own samples, each labelled by one aspect that
the exact judge measures. Two sets of four are merged: `diffalign merge` makes their sum, their average, and a sum with
weights chosen on validation prompts. A gain is the change of an aspect's mean on test prompts, from the base's noise
and without guidance. A share is the gain of the merged LoRA over that of the expert; its interval is a bootstrap over
prompts.
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
from diffalign.playground.judge import look
from diffalign.playground.world import BACKGROUNDS, parse
from reward_models.accuracy import interval
from reward_models.files import write_lines

RESULTS = Path(__file__).parent / "results" / "skills.json"
SETS = {
    "compatible": ("colour", "placement", "size", "ground"),
    "conflicting": ("colour", "placement", "size", "cleanliness"),
}
"""Skills that are merged: vividness, placement and area of the object, the background's colour, and an image without
texture. In this world the texture grows with contrast and size of the object, so cleanliness conflicts with colour and
size."""
NEAR = 0.05
"""Distance in RGB at which a background is 1 / e as good as one of exactly the colour that the caption names."""
PAIRS = 1000
"""Pairs of each expert: of the shipped ones, those that differ most in its aspect."""
STEPS = 200
COMMON = (0.75, 1.0)
"""Weights that the search tries for all experts at once."""
ROUNDS = 2
"""How often it changes the best weights."""

Means = dict[str, NDArray[np.float64]]
"""Means of `aspects` over the images of each prompt."""


def label(world: World, skill: str) -> Path:
    """Pairs labelled by one skill only: the PAIRS shipped ones that differ most in it."""
    out = world.folder / f"{skill}.jsonl"
    if not out.exists():
        folder = world.unpacked("own")
        rows, images = load(folder)
        values = aspects(images, [row["prompt"] for row in rows])[skill]
        margin, lines = values[::2] - values[1::2], []
        for i in margin.abs().argsort(descending=True, stable=True)[:PAIRS].tolist():
            names = [str(Path("own") / rows[2 * i + k]["image"]) for k in (0, 1)]
            chosen, rejected = names if margin[i] > 0 else names[::-1]
            lines.append({"prompt": rows[2 * i]["prompt"], "chosen": chosen, "rejected": rejected})
        write_lines(out, lines)
    return out


def aspects(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Every skill of images [N, 3, 32, 32], in [0, 1], and `points` of the true taste, each [N]."""
    found, ground = Judge().measure(images, prompts), look(images)[0].background
    wanted = ground.new_tensor([BACKGROUNDS[parse(prompt).background] for prompt in prompts])
    names = {"colour": "vivid", "placement": "place", "size": "area", "cleanliness": "clean"}
    skills = {k: found[name] for k, name in names.items()}
    skills["ground"] = torch.exp(-(ground - wanted).norm(dim=1) / NEAR)
    return skills | {"points": Judge().score(images, prompts)}


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
    samples = SAMPLES if prompts == "test" else 2
    folder = world.images(BASE, prompts, *(f"--lora={lora}" for lora in loras), out=out, samples=samples)
    rows, images = load(folder)
    texts = [row["prompt"] for row in rows]
    found = aspects(images, texts)
    return {name: value.view(len(set(texts)), -1).mean(1).double().numpy() for name, value in found.items()}


def search(world: World, experts: Mapping[str, Path]) -> dict[str, float]:
    """Weights with the largest smallest share on validation prompts, of those tried.

    Common weights are tried first. Then the best weights are changed ROUNDS times, each divided by its skill's share.
    """
    base = measured(world, "validation")
    alone = {k: measured(world, "validation", f"expert-{k}", [str(path)])[k] - base[k] for k, path in experts.items()}
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
    lines = []
    for one in rows:
        cells = [f"{k} " + "{:.0%} [{:.0%}, {:.0%}]".format(*x) for k, x in one["share"].items()]
        cells.append("points {:+.2f} [{:+.2f}, {:+.2f}]".format(*one["gain"]["points"]))
        lines.append(f"{one['set']:<12}{one['lora']:<12}" + "  ".join(f"{cell:<29}" for cell in cells))
    return "\n".join(lines)


def run(world: World, name: str) -> list[dict[str, Any]]:
    """Train, merge and measure the skills of a set; one row for each expert and each way to merge."""
    experts = {skill: train(world, skill) for skill in SETS[name]}
    base = measured(world, "test")
    found = {k: measured(world, "test", f"expert-{k}", [str(path)]) for k, path in experts.items()}
    alone = {k: found[k][k] for k in experts}
    ways = {way: dict.fromkeys(experts, 1.0) for way in ("sum", "average")}
    ways["weighted"] = search(world, experts)
    for way, weights in ways.items():
        lora = merge(world, experts, way, world.folder / f"merged-{name}-{way}", weights)
        found[way] = measured(world, "test", lora.name, [str(lora)])
    about = {"set": name, "steps": STEPS, "pairs": PAIRS}
    return [{**about, "lora": k, "weights": ways.get(k), **row(base, means, alone)} for k, means in found.items()]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        started = time.process_time()
        world, rows = World(args.folder or Path(name)), list[dict[str, Any]]()
        for group in SETS:
            rows += [{**one, "cpu": cpu(), "commit": commit()} for one in run(world, group)]
            write_rows(RESULTS, rows)
        print(table(rows), f"{time.process_time() - started:.0f} seconds of processor time", sep="\n")


if __name__ == "__main__":
    program.run(main)
