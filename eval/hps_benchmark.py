"""HPS v2 benchmark: mean score of a model's images for the published prompts, for each style.

    diffalign eval hps_benchmark --images images --prompts HPDv2/benchmark --scorer hps_v2.1,unit=x100
    python eval/hps_benchmark.py --images images --prompts HPDv2/benchmark --styles drawbench --scorer hps_v2,unit=x100

The image of prompt number k of PROMPTS/STYLE.json, a list of prompts, is IMAGES/STYLE/{k:05d}.jpg; all must exist,
and no other files. A style's result is the mean and the standard deviation (of the population) over the means of 80
prompts each, and the mean of all scores with its 95 % interval over prompts; drawbench has the latter only. Published
tables are in hundreds of the cosine, unit=x100. FILE.json holds the score of every image.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from diffalign.commands import program
from reward_models.files import read_json, write_whole
from reward_models.loading import load_scorer

if TYPE_CHECKING:
    from reward_models.folder.item import Item
    from reward_models.protocol import Scorer

STYLES = ("anime", "concept-art", "paintings", "photo")
PLAIN = "drawbench"
GROUP = 80
LIBRARIES = ("torch", "torchvision", "pillow", "open_clip_torch", "transformers")
SHOWN = 10
"""Maximum number of files named in an error message."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        benchmark(args)
    except (ValueError, OSError) as error:
        print(f"hps_benchmark: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="folder with a subfolder for each style")
    add("--prompts", type=Path, required=True, metavar="DIR", help="folder with a .json list for each style")
    add(
        "--scorer",
        action="append",
        required=True,
        metavar="SPEC",
        help="name, folder or package.module:Class; repeatable",
    )
    add("--styles", nargs="+", choices=[*STYLES, PLAIN], default=STYLES, help="default: all but drawbench")
    add("--out", type=Path, metavar="FILE.json", help="results and scores")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda:1, ...")
    add("--batch-size", type=int, default=32, metavar="B", help="images scored at once (32)")
    add("--seed", type=int, default=0, help="seed of the bootstrap (0)")
    return parser


def benchmark(args: argparse.Namespace) -> None:
    """Score every image, print a line for each scorer and style, write the file."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1; got {args.batch_size}")
    items = find(args.images, args.prompts, list(dict.fromkeys(args.styles)))
    scorers = {spec: load_scorer(spec, args.device) for spec in args.scorer}
    scores = score(items, scorers, args.batch_size)
    results = []
    for spec, scorer in scorers.items():
        rows = {style: summary(style, x, args.seed) for style, x in scores[spec].items()}
        pooled = [x for style, found in scores[spec].items() if style != PLAIN for x in found]
        if pooled:
            rows["average"] = summary("average", pooled, args.seed)
        for style, row in rows.items():
            print(line(spec, style, row, scorer.unit), flush=True)
        results.append({"name": spec, "unit": scorer.unit, "results": rows, "scores": scores[spec]})
    if args.out is not None:
        found = {"images": str(args.images), "prompts": str(args.prompts), "seed": args.seed, "scorers": results}
        text = json.dumps({**found, "versions": {x: version(x) for x in LIBRARIES}}, indent=1, allow_nan=False)
        write_whole(args.out, text + "\n")


def find(images: Path, prompts: Path, styles: Sequence[str]) -> dict[str, list[Item]]:
    """Images of every style with their prompts, in order. Raises ValueError listing missing and extra files."""
    from reward_models.folder.item import Item  # here and below: heavy, and `--help` needs none of it

    found: dict[str, list[Item]] = {}
    missing, extra = [], []
    for style in styles:
        texts = _prompts(prompts / f"{style}.json")
        folder = images / style
        there = {x.name for x in folder.iterdir() if x.is_file() and x.name[0] != "."} if folder.is_dir() else set()
        names = [f"{k:05d}.jpg" for k in range(len(texts))]
        missing += [f"{style}/{name}" for name in names if name not in there]
        extra += [f"{style}/{name}" for name in sorted(there - set(names))]
        found[style] = [Item(f"{style}/{name}", text, folder / name) for name, text in zip(names, texts, strict=True)]
    problems = [f"'{images}' {what} {_list(x)}" for what, x in (("lacks", missing), ("has besides", extra)) if x]
    if problems:
        raise ValueError(
            "; ".join(problems)
            + "; the folder must contain one .jpg per prompt, named by its number, and no other files"
        )
    return found


def _prompts(file: Path) -> list[str]:
    texts = read_json(file)
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(x, str) for x in texts):
        raise ValueError(f"'{file}' must hold a list of prompts; got {str(texts)[:80]}")
    return texts


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def score(
    items: dict[str, list[Item]], scorers: dict[str, Scorer], batch_size: int
) -> dict[str, dict[str, list[float]]]:
    """Scores: scorer -> style -> scores in prompt order. Raises ValueError listing images that cannot be scored."""
    from reward_models.folder.decoding import Decoder
    from reward_models.folder.scoring import Failed, score_items

    scores: dict[str, dict[str, list[float]]] = {name: {style: [] for style in items} for name in scorers}
    bad: list[str] = []
    with Decoder() as decoder, tqdm(total=sum(map(len, items.values())), desc="score", unit="image") as bar:
        for style, whole in items.items():
            work = [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)]
            for results in score_items(work, scorers, decoder):
                for result in results:
                    if isinstance(result, Failed):
                        bad.append(f"{result.item.image} ({result.reason})")
                        continue
                    for name, value in zip(scorers, result.scores, strict=True):
                        scores[name][style].append(value)
                bar.update(len(results))
    if bad:
        raise ValueError(f"{len(bad)} images cannot be scored: {_list(bad)}")
    return scores


def summary(style: str, scores: Sequence[float], seed: int) -> dict[str, Any]:
    """Mean of all scores with its interval; for a style also mean and standard deviation of its group means."""
    import numpy as np

    from reward_models.accuracy import interval

    values = np.asarray(scores)
    low, high = interval(values, seed=seed)
    row: dict[str, Any] = {"images": len(values), "mean": float(values.mean()), "low": low, "high": high}
    if style in STYLES:
        groups = [values[i : i + GROUP].mean() for i in range(0, len(values), GROUP)]
        row |= {"groups": len(groups), "group_mean": float(np.mean(groups)), "group_std": float(np.std(groups))}
    return row


def line(spec: str, style: str, row: dict[str, Any], unit: str) -> str:
    """Format one result as a line."""
    groups = ""
    if "groups" in row:
        groups = f", groups {row['group_mean']:.4g} +- {row['group_std']:.4f}"
    interval_text = f"[{row['low']:.4g}, {row['high']:.4g}]"
    return f"{spec} {style} {row['mean']:.4g} {interval_text}{groups}, {row['images']} images, unit {unit}"


if __name__ == "__main__":
    program.run(main)
