"""Scorer benchmark: train the playground's scorers from scratch, and compare with the exact judge on held-out captions.

    python benchmarks/scorers.py                        # every recipe and seed that results/scorers.json lacks
    python benchmarks/scorers.py --recipe hps --seed 0 --ship

A scorer learns from ratings and rankings by noisy annotators of rendered images; its accuracy is the share of pairs of
images of one held-out caption that it puts in the judge's own order, with a bootstrap interval over captions. Beside it
the ceiling: how often the annotators' own ranking agrees with the judge. Scorers with several aspects are measured
on each. --generated adds the samples of a folder that `diffalign generate` wrote, four of a prompt at a time. --ship
puts the weights where the package keeps them.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_file import TEXT, WHOLE, commit, read_rows, write_rows
from torch import Tensor

from diffalign.commands import launch, program
from diffalign.playground import Judge
from diffalign.playground.ratings import rate, write_ratings
from reward_models import load_scorer, read_image
from reward_models.accuracy import interval
from reward_models.files import replacing_folder
from reward_models.playground import PLAYGROUND

RESULTS = Path(__file__).parent / "results" / "scorers.json"
RECIPES = ("hps", "vp_score")
PROMPTS = 8000


def train(recipe: str, ratings: Path, run: Path, seed: int, steps: int | None = None) -> float:
    """Train by the recipe's playground config, for so many steps where given; returns the seconds."""
    started = time.time()
    longer = [] if steps is None else [f"trainer.steps={steps}", f"optimizer.lr_cosine_steps={steps}"]
    settings = [*longer, f"run.folder={run}", f"run.seed={seed}", f"data.path={ratings}", f"scorer.seed={seed}"]
    runpy.run_path(str(launch.find("train", recipe)))["main"](
        ["--config=playground", *settings, "hooks.checkpoint_every=0"]
    )
    return time.time() - started


def merged(folder: Path, files: Sequence[Path]) -> Path:
    """The lines of several ratings.jsonl in one file, their images named from there."""
    lines = []
    for file in files:
        for row in map(json.loads, file.read_text().splitlines()):
            names = [os.path.relpath(file.parent / name, folder) for name in row["images"]]
            lines.append(json.dumps({**row, "images": names}))
    out = folder / "all.jsonl"
    out.write_text("\n".join(lines) + "\n")
    return out


class HeldOut:
    """Rated images of held-out captions: `truth` [N] by the judge, `rated` [N] by an annotator, four a caption."""

    def __init__(self, folder: Path, prompts: int = 720, seed: int = 1000):
        lines = write_ratings(folder, prompts, held_out=True, seed=seed).read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        self.images = torch.stack([read_image(folder / name) for row in rows for name in row["images"]]).float() / 255
        self.prompts = [row["prompt"] for row in rows for _ in row["images"]]
        self.truth = Judge().score(self.images, self.prompts)
        self.rated = -torch.tensor([float(rank) for row in rows for rank in row["ranking"]])
        m = Judge().measure(self.images, self.prompts)
        following = torch.stack([m[x] for x in ("colour", "shape", "background", "size")]).mean(0)
        self.aspects = {"prompt_following": following, "aesthetic": m["vivid"], "fidelity": m["clean"]}
        self.aspects["composition"] = m["place"]

    def accuracy(self, scores: Tensor, truth: Tensor) -> dict[str, Any]:
        """Share of pairs in the correct order without true ties, averaged over captions, with its interval."""
        each = []
        for mine in torch.arange(len(truth)).view(-1, 4):
            d, t = (x[mine][:, None] - x[mine][None] for x in (scores, truth))
            if (t > 0).any():
                each.append(float(((d > 0) & (t > 0)).sum() / (t > 0).sum()))
        low, high = interval(each, resamples=9999)
        return {"accuracy": round(float(np.mean(each)), 4), "low": round(low, 4), "high": round(high, 4)}


@torch.no_grad()
def measure(scorer: Any, held_out: HeldOut) -> dict[str, Any]:
    """Accuracy against the true preference, and of each aspect for scorers with several."""
    batches = range(0, len(held_out.prompts), 64)
    pieces = [(held_out.images[i : i + 64], held_out.prompts[i : i + 64]) for i in batches]
    row = held_out.accuracy(torch.cat([scorer.score(*piece) for piece in pieces]), held_out.truth)
    row["ceiling"] = held_out.accuracy(held_out.rated, held_out.truth)["accuracy"]
    if hasattr(scorer, "score_aspects"):
        found = [scorer.score_aspects(*piece) for piece in pieces]
        row["aspects"] = {
            name: held_out.accuracy(torch.cat([x[name] for x in found]), truth)
            for name, truth in held_out.aspects.items()
        }
    return row


def ship(export: Path, recipe: str) -> None:
    """Copy an export into the package, in half precision."""
    scorer: Any = load_scorer(str(export), "cpu")
    with replacing_folder(PLAYGROUND / recipe) as folder:
        scorer.half().save(folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="default: all")
    parser.add_argument("--seed", type=int, action="append", help="default: 0, 1, 2")
    parser.add_argument("--steps", type=int, help="instead of the config's")
    parser.add_argument("--generated", type=Path, action="append", default=[], metavar="FOLDER", help="to rate as well")
    parser.add_argument("--ship", action="store_true", help="copy the weights into the package")
    args = parser.parse_args(argv)
    rows = read_rows(RESULTS, {"scorer": TEXT, "seed": WHOLE})
    done = {(r["scorer"], r["seed"]) for r in rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rated = [write_ratings(folder / "ratings", PROMPTS), *(rate(f.absolute()) for f in args.generated)]
        ratings, held_out = merged(folder, rated), HeldOut(folder / "held_out")
        for recipe in args.recipe or RECIPES:
            for seed in args.seed or (0, 1, 2):
                if (recipe, seed) in done:
                    continue
                seconds = train(recipe, ratings, folder / f"{recipe}-{seed}", seed, args.steps)
                export = folder / f"{recipe}-{seed}" / "export"
                found = measure(load_scorer(str(export), "cpu"), held_out)
                rows.append({"scorer": recipe, "seed": seed, **found, "seconds": round(seconds)})
                rows[-1] |= {"steps": args.steps, "generated": len(args.generated), "commit": commit()}
                print(json.dumps(rows[-1]), flush=True)
                write_rows(RESULTS, rows)
                if args.ship:
                    ship(export, recipe)


if __name__ == "__main__":
    program.run(main)
