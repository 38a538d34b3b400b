"""Simulated annotators: people with known tastes and known noise, who compare two images of a prompt."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from diffalign.draws import Draws
from diffalign.playground.judge import TRUE_TASTE, Judge

_MATCH = {"colour": 1.0, "shape": 1.0, "background": 1.0, "size": 1.0}
TASTES = {
    "common": TRUE_TASTE,
    "vivid": {**_MATCH, "vivid": 4.0, "clean": 1.0},
    "muted": {**_MATCH, "vivid": -4.0, "clean": 1.0},
    "tidy": {**_MATCH, "place": 4.0, "clean": 2.0},
    "bold": {**_MATCH, "area": 5.0, "vivid": 1.0},
    "modest": {**_MATCH, "area": -5.0, "place": 1.0},
}
"""People. All want what the prompt says; beyond that they differ, `vivid` and `muted` as opposites."""

Labels = Literal["true", "flipped", "random"]


class Annotator:
    """Prefers by Bradley-Terry on their own taste: P(first) = sigmoid((score_0 - score_1) / temperature).

    temperature is in points of the judge. Every choice is drawn by key, so the same pair gets the same answer again.
    """

    def __init__(self, name: str = "common", *, temperature: float = 0.35, seed: int = 0):
        if name not in TASTES:
            raise ValueError(f"no annotator '{name}'; known: {', '.join(TASTES)}")
        self.name, self.judge, self.temperature, self.draws = name, Judge(taste=TASTES[name]), temperature, Draws(seed)

    def choose(
        self, first: Tensor, second: Tensor, prompts: Sequence[str], keys: Sequence[Any]
    ) -> tuple[Tensor, Tensor]:
        """Images [B, 3, 32, 32] twice -> (first is chosen [B] bool, true margin [B] in points, first minus second)."""
        margin = self.judge.score(first, prompts) - self.judge.score(second, prompts)
        chance = self.draws.uniform(keys, stream=f"annotator {self.name}")
        return chance < torch.sigmoid(margin / self.temperature), margin


def load(folder: Path) -> tuple[list[dict[str, Any]], Tensor]:
    """A folder written by eval/generate.py: its manifest rows, and the images [N, 3, 32, 32] in [0, 1]."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    images = [pil_to_tensor(Image.open(folder / row["image"]).convert("RGB")) for row in rows]
    return rows, torch.stack(images).float() / 255


def label(
    folder: Path,
    out: Path,
    *,
    annotators: Sequence[str] = ("common",),
    temperature: float = 0.35,
    min_margin: float = 0.3,
    labels: Labels = "true",
    seed: int = 0,
) -> tuple[int, int]:
    """Compare the samples of each prompt in a generated folder, write the pairs; returns (pairs kept, pairs compared).

    Prompts go to the annotators in turn. Pairs whose true margin is under `min_margin` points are left out: nobody can
    tell. `flipped` swaps every label, and `random` says nothing: the controls of an alignment experiment. `out` ends in
    .jsonl (prompt, chosen, rejected, annotator) or .parquet (Pick-a-Pic's columns, images inside).
    """
    rows, images = load(folder)
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row["prompt_id"], []).append(i)
    pairs = [(g, a, b) for g, ids in groups.items() for a, b in zip(ids[::2], ids[1::2], strict=False)]
    kept = []
    for turn, name in enumerate(annotators):
        mine = [p for k, p in enumerate(pairs) if k % len(annotators) == turn]
        first, second = [a for _, a, _ in mine], [b for _, _, b in mine]
        annotator = Annotator(name, temperature=temperature, seed=seed)
        keys = [(g, a, b) for g, a, b in mine]
        prompts = [rows[a]["prompt"] for a in first]
        chosen, margin = annotator.choose(images[first], images[second], prompts, keys)
        if labels == "flipped":
            chosen = ~chosen
        elif labels == "random":
            chosen = _uninformative(margin, annotator.draws.uniform(keys, stream="random label") < 0.5)
        for (_, a, b), won, gap in zip(mine, chosen.tolist(), margin.abs().tolist(), strict=True):
            if gap >= min_margin:
                kept.append((rows[a]["prompt"], a, b, won, name))
    write = _write_parquet if out.suffix == ".parquet" else _write_jsonl
    write(kept, [folder / row["image"] for row in rows], out)
    return len(kept), len(pairs)


def _uninformative(margin: Tensor, coin: Tensor) -> Tensor:
    """Labels that say nothing: of two pairs with neighbouring true margins, a coin decides which one is labelled right.

    A coin for each pair would be fair only in the mean: over some hundred pairs it agrees or disagrees with the truth
    by chance, and what is learned from that would be measured as if it were the method's own drift.
    """
    order = margin.abs().argsort(stable=True)
    right = coin[order].clone()
    right[1::2] = ~right[0::2][: len(right) // 2]
    better = margin > 0
    return better == torch.empty_like(coin).index_copy_(0, order, right)


def _write_jsonl(pairs: list[tuple[str, int, int, bool, str]], paths: list[Path], out: Path) -> None:
    def line(prompt: str, a: int, b: int, won: bool, name: str) -> str:
        chosen, rejected = (a, b) if won else (b, a)
        images = {k: os.path.relpath(paths[i], out.parent) for k, i in (("chosen", chosen), ("rejected", rejected))}
        return json.dumps({"prompt": prompt, **images, "annotator": name})

    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text("".join(line(*p) + "\n" for p in pairs))
    os.replace(temporary, out)


def _write_parquet(pairs: list[tuple[str, int, int, bool, str]], paths: list[Path], out: Path) -> None:
    def jpeg(i: int) -> bytes:
        buffer = io.BytesIO()
        Image.open(paths[i]).convert("RGB").save(buffer, "JPEG", quality=95, subsampling=0)
        return buffer.getvalue()

    table = pa.table(
        {
            "caption": [p[0] for p in pairs],
            "jpg_0": [jpeg(p[1]) for p in pairs],
            "jpg_1": [jpeg(p[2]) for p in pairs],
            "label_0": [float(p[3]) for p in pairs],
            "label_1": [1.0 - p[3] for p in pairs],
            "has_label": [True] * len(pairs),
        }
    )
    temporary = out.with_name(out.name + ".tmp")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, out)
