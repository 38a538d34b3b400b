"""Accuracy of scorers on a preference data set, by every published definition.

    diffalign eval reward_accuracy --scorer hps_v2.1 --scorer pickscore --data HPDv2/test.json --out accuracy.json
    python eval/reward_accuracy.py --scorer image_reward --data ImageRewardDB/images/test --metric ir_micro
    python eval/reward_accuracy.py --scorer pickscore,unit=logit --data test_unique.parquet \
        --validation validation_unique.parquet --metric pick_threshold

PATH is a preference data set in any layout that diffalign reads. Prints a line for each scorer and metric, with a 95 %
interval over prompts. FILE.json holds them with the versions of the libraries. docs/reward_accuracy.md says which
metric belongs to which published number. Every image must be readable: an accuracy on a subset would not be comparable.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from diffalign.commands import program
from reward_models.accuracy import METRICS, Group, accuracy, always_tie, best_threshold, pick_threshold
from reward_models.files import write_whole
from reward_models.loading import load_scorer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffalign.data import ImageRef, Record
    from reward_models.protocol import Scorer

PICK = "pick_threshold"
LIBRARIES = ("torch", "torchvision", "pillow", "open_clip_torch", "transformers", "numpy", "scipy")
SHOWN = 10
"""Maximum number of bad images named in an error message."""


class Loaded(NamedTuple):
    """Data set: records (including ties), and counts of the dropped records by reason."""

    path: str
    records: list[Record]
    dropped: dict[str, int]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        measure(args)
    except (ValueError, OSError) as error:
        print(f"reward_accuracy: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--scorer",
        action="append",
        required=True,
        metavar="SPEC",
        help="name, folder or package.module:Class; repeatable",
    )
    add("--data", required=True, metavar="PATH", help="preference data set")
    add("--metric", action="append", choices=[*METRICS, PICK], help="may be repeated; default: all of them")
    add("--validation", metavar="PATH", help=f"data set on which {PICK} chooses its threshold")
    add("--limit", type=int, metavar="N", help="only the first N records")
    add("--out", type=Path, metavar="FILE.json", help="results")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda:1, ...")
    add("--batch-size", type=int, default=32, metavar="B", help="images scored at once (32)")
    add("--seed", type=int, default=0, help="seed of the bootstrap (0)")
    return parser


def measure(args: argparse.Namespace) -> None:
    """Score every image once by every scorer, print a line for each metric, write the file."""
    metrics = args.metric or [*METRICS, *([PICK] if args.validation else [])]
    if PICK in metrics and not args.validation:
        raise ValueError(f"{PICK} needs --validation, because its threshold is chosen on data other than the test data")
    for name in ("batch_size", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(args, name)}")
    scorers = {spec: load_scorer(spec, args.device) for spec in args.scorer}  # a misspelt name fails before any work
    data = load(args.data, args.limit)
    groups = score(data.records, scorers, args.batch_size)
    chosen = load(args.validation, args.limit).records if PICK in metrics else []
    validation = score(chosen, scorers, args.batch_size) if chosen else {}
    results = []
    for spec, scorer in scorers.items():
        found = [_result(name, groups[spec], validation.get(spec, []), args.seed) for name in metrics]
        results.append({"name": spec, "unit": scorer.unit, "metrics": found})
        for result in found:
            print(line(spec, scorer.unit, result, data.path), flush=True)
    if args.out is not None:
        labels = json.dumps([(r.id, r.prompt, r.ranks) for r in data.records])
        found = {
            "data": data.path,
            "validation": args.validation,
            "limit": args.limit,
            "records": len(data.records),
            "labels": f"sha256 {hashlib.sha256(labels.encode()).hexdigest()[:12]}",
            "dropped": data.dropped,
            "seed": args.seed,
            "scorers": results,
            "versions": {name: version(name) for name in LIBRARIES},
        }
        write_whole(args.out, json.dumps(found, indent=1, allow_nan=False) + "\n")


def load(path: str, limit: int | None) -> Loaded:
    """Load the first `limit` records, or all. Reports dropped records on stderr. Raises ValueError if none is left."""
    from diffalign.data import Dropped, read_records  # here and below: heavy, and `--help` needs none of it

    records: list[Record] = []
    dropped: Counter[str] = Counter()
    for one in read_records(path, keep_ties=True):
        if isinstance(one, Dropped):
            dropped[one.kind] += 1
        else:
            records.append(one)
            if len(records) == limit:
                break
    reasons = ", ".join(f"{n} {kind}" for kind, n in dropped.most_common())
    if not records:
        raise ValueError(f"no usable record in '{path}' ({reasons or 'it is empty'})")
    if dropped:
        print(f"reward_accuracy: records of '{path}' that are left out: {reasons}", file=sys.stderr)
    return Loaded(path, spread(records), dict(dropped))


def spread(records: list[Record]) -> list[Record]:
    """Reverse half of the records if the better image is always the first (or always the last).

    Otherwise a metric that prefers the first image in a tie would get these pairs right by position.
    """
    for better in (0, -1):
        if all(r.ranks[better] == min(r.ranks) for r in records):
            return [_reversed(r) if hashlib.blake2b(r.id.encode()).digest()[0] % 2 else r for r in records]
    return records


def _reversed(record: Record) -> Record:
    from diffalign.data import Record

    return Record(record.id, record.prompt, record.images[::-1], record.ranks[::-1])


def score(records: Sequence[Record], scorers: Mapping[str, Scorer], batch_size: int) -> dict[str, list[Group]]:
    """Scored groups of every scorer. An image is decoded once, and scored once per prompt.

    Raises ValueError naming all missing and damaged images, after checking every image.
    """
    import torch

    prompts_of: dict[ImageRef, dict[str, None]] = {}
    for record in records:
        for ref in record.images:
            prompts_of.setdefault(ref, {})[record.prompt] = None
    scores: dict[str, dict[tuple[ImageRef, str], float]] = {name: {} for name in scorers}
    bad: list[str] = []
    for batch in _batches(prompts_of, batch_size, bad):
        if bad:
            continue  # the run fails; check the remaining images, to report all bad ones at once
        pixels = torch.stack([image for _, _, image in batch])
        keys = [(ref, prompt) for ref, prompt, _ in batch]
        for name, scorer in scorers.items():
            scores[name] |= zip(keys, _scores(name, scorer, pixels, keys), strict=True)
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(
            f"{len(bad)} of {len(prompts_of)} images cannot be read:\n  " + "\n  ".join(bad[:SHOWN]) + more
        )
    return {
        name: [Group(r.prompt, [found[ref, r.prompt] for ref in r.images], r.ranks) for r in records]
        for name, found in scores.items()
    }


def _batches(
    prompts_of: Mapping[ImageRef, Mapping[str, None]], batch_size: int, bad: list[str]
) -> Iterator[list[tuple[ImageRef, str, Tensor]]]:
    """Batches of equally sized images with their prompts; messages for unreadable images are added to `bad`.

    Images wait for a full batch of their size; at most eight batches of images wait.
    """
    from diffalign.data.images import prefetch

    waiting: dict[torch.Size, list[tuple[ImageRef, str, Tensor]]] = {}
    images = prefetch(prompts_of, _decode)
    for ref, image in zip(
        prompts_of, tqdm(images, total=len(prompts_of), desc="score", unit="image", leave=False), strict=True
    ):
        if isinstance(image, str):
            bad.append(image)
            continue
        for prompt in prompts_of[ref]:
            same = waiting.setdefault(image.shape, [])
            same.append((ref, prompt, image))
            if len(same) == batch_size:
                yield waiting.pop(image.shape)
        if sum(map(len, waiting.values())) > 8 * batch_size:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()


def _decode(ref: ImageRef) -> Tensor | str:
    from reward_models.images import ImageError, decode, to_tensor

    try:
        return to_tensor(decode(ref.read()))
    except FileNotFoundError:
        return f"{ref}: missing"
    except (OSError, ImageError) as error:
        return f"{ref}: {error}"


def _scores(name: str, scorer: Scorer, pixels: Tensor, keys: Sequence[tuple[ImageRef, str]]) -> list[float]:
    import torch

    from reward_models.protocol import checked, device_of

    images = pixels.to(device_of(scorer)).float() / 255
    with torch.no_grad():
        scores = checked(name, scorer.score(images, [prompt for _, prompt in keys]), len(keys))
    for (ref, _), value in zip(keys, scores.tolist(), strict=True):
        if not math.isfinite(value):
            raise ValueError(f"scorer '{name}' returned {value} for {ref}")
    return scores.tolist()


def _result(metric: str, groups: list[Group], validation: list[Group], seed: int) -> dict[str, Any]:
    if metric != PICK:
        return asdict(accuracy(metric, groups, seed=seed))
    threshold = best_threshold(validation)
    found = accuracy(metric, groups, partial(pick_threshold, threshold=threshold), seed=seed)
    return {**asdict(found), "threshold": threshold, "always_tie": always_tie(groups)}


def line(spec: str, unit: str, result: Mapping[str, Any], data: str) -> str:
    """Format one result as a line, with everything needed to compare it."""
    value, low, high = (f"{result[k]:.4f}" for k in ("value", "low", "high"))
    counts = ", ".join(f"{result[k]} {k.replace('_', ' ')}" for k in ("prompts", "pairs", "ties", "score_ties"))
    extra = ""
    if "threshold" in result:
        extra = f", threshold {result['threshold']}, always 'tie' {result['always_tie']:.4f}"
    return f"{spec} {result['metric']} {value} [{low}, {high}]{extra}, {counts}, unit {unit}, {data}"


if __name__ == "__main__":
    program.run(main)
