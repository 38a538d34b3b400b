"""The papers' claims, measured: short runs that the leaderboard lacks, judged as its rows are.

    python benchmarks/claims.py --hours 2                         # everything that the results lack
    python benchmarks/claims.py --case "robust, 30% flipped"

Writes, run by run, results/claims.json, and docs/leaderboard.md again. Continues where it was stopped. What compares
people with each other is in benchmarks/personal.py.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from leaderboard import WORK, Board, describe, itself, write_pages
from leaderboard_claims import CASES, PLAIN, Case
from leaderboard_world import NUMBERS, World
from results_file import commit
from torch.nn import functional as F

from diffalign.commands import program
from diffalign.draws import Draws
from diffalign.playground.annotators import label
from diffalign.playground.ratings import write_ratings
from reward_models import read_image
from reward_models.training import clip_to_train

TO_RUN = [name for name, case in CASES.items() if case.settings is not None]


def plain_clip(world: World, steps: int = 800, batch: int = 96) -> Path:
    """A scorer with the HPS-style scorer's network, trained to tell captions of renders apart (CLIP)."""
    out = world.folder / "plain_clip"
    if not (out / "reward_config.json").exists():
        ratings = world.folder / "ratings" / "ratings.jsonl"
        if not ratings.exists():
            write_ratings(ratings.parent, 3000)
        rows = [json.loads(line) for line in ratings.read_text().splitlines()]
        images = torch.stack([read_image(ratings.parent / name) for row in rows for name in row["images"]])
        texts = [row["prompt"] for row in rows for _ in row["images"]]
        scorer = clip_to_train(torch.device("cpu"), architecture="playground", weights=None, trains=())
        settings = {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 0.1}
        optimizer = torch.optim.AdamW(scorer.parameters(), **settings)
        lr = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.06)
        for step in range(steps):
            some = Draws(0).permutation(len(texts), key=step, stream="plain CLIP")[: 2 * batch].tolist()
            some = list({texts[i]: i for i in some}.values())[:batch]  # a caption once: its images are all right
            pixels = scorer.preprocess(images[some].float() / 255)
            captions = scorer.text_features([texts[i] for i in some])
            logits = scorer.logit_scale() * scorer.image_features(pixels) @ captions.T
            right = torch.arange(len(some))
            loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lr.step()
            if step % 100 == 0 or step == steps - 1:
                print(f"plain CLIP, step {step}: loss {loss.item():.3f}", flush=True)
        scorer.eval().save(out)
    return out


def settings_of(world: World, case: Case) -> tuple[str, ...]:
    """What a case adds to its row on the command line: its settings, its labels, its scorer."""
    words = list(case.settings or ())
    if case.noise:
        pairs = world.folder / f"own-pairs-noise-{case.noise}.jsonl"
        if not pairs.exists():
            label(world.unpacked("own"), pairs, min_margin=0, noise=case.noise)
        words.append(f"data.path={pairs}")
    if case.scorer:
        words.append(f"reward.scorers=['{plain_clip(world) if case.scorer == PLAIN else case.scorer}']")
    return tuple(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", choices=TO_RUN, action="append", metavar="CASE", help=f"of {'; '.join(TO_RUN).replace('%', '%%')}"
    )
    parser.add_argument("--hours", type=float, default=12, help="start no run after so many hours (12)")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of images, latents and runs (runs/leaderboard)")
    args = parser.parse_args()
    board, world, started = Board(), World(args.work), time.time()
    for name in args.case or TO_RUN:
        if time.time() - started > args.hours * 3600:
            break
        case = CASES[name]
        if not any(r["case"] == name for r in board.rows["claims"]):
            list(itself(board, world, case.row.model))
            found, by_prompt = world.run(case.row, settings_of(world, case), "true", 0, "test")
            row = {"case": name, **describe(case.row, "true", 0), **found, **by_prompt}
            row |= {"settings": [*case.row.changes, *(case.settings or ())], "commit": commit()}
            board.put("claims", row, ("case",))
            print(name, *(f"{number} {found[number]}" for number in NUMBERS), flush=True)
            write_pages(board)
    write_pages(board)


if __name__ == "__main__":
    program.run(main)
