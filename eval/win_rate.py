"""Paired win rate of an aligned model over its base, with intervals, by any scorers.

    diffalign eval win_rate base aligned --scorer clip --scorer my_package.my_module:MyScorer --out win_rate.json
    python eval/win_rate.py base aligned --scorer diffalign.playground:Judge --out win_rate.json
    diffalign eval win_rate base aligned --groups --out win_rate.json \
        --scorer people/export,user=young.safetensors --scorer people/export,user=old.safetensors

BASE and ALIGNED are folders written by tools/generate.py from the same prompts, samples per prompt and seed. Use at
least one scorer that was not trained against. Prints a line for each scorer; FILE.json holds the results and the
scores of every pair, from which eval/report.py makes a page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.commands import program
from reward_models.files import write_whole
from reward_models.loading import load_scorer

if TYPE_CHECKING:
    from diffalign.report import Pair
    from reward_models.protocol import Scorer


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        compare(args)
    except (ValueError, OSError) as error:
        print(f"win_rate: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("base", type=Path, help="folder of the base model's images")
    add("aligned", type=Path, help="folder of the aligned model's images")
    add(
        "--scorer", action="append", required=True, metavar="SPEC", help="name or package.module:Class; may be repeated"
    )
    add("--groups", action="store_true", help="each scorer is a group of people: say who gains least as well")
    add("--out", type=Path, required=True, metavar="FILE.json", help="results and scores")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda:1, ...")
    add("--batch-size", type=int, default=32, metavar="B", help="images scored at once (32)")
    add("--seed", type=int, default=0, help="of the bootstrap (0)")
    return parser


def compare(args: argparse.Namespace) -> None:
    """Score both folders with every scorer, print the table, write the file."""
    from diffalign.report import read_pairs  # here and below: heavy, and `--help` needs none of it

    pairs = read_pairs(args.base, args.aligned)
    equal = sum(pair.base.read_bytes() == pair.aligned.read_bytes() for pair in pairs)
    if equal and args.base.resolve() != args.aligned.resolve():
        print(f"win_rate: {equal_line(equal, len(pairs))}", file=sys.stderr)
    loaded = {spec: load_scorer(spec, args.device) for spec in args.scorer}  # a misspelt name fails before any work
    scorers = []
    for spec, scorer in loaded.items():
        scorers.append(_result(spec, scorer, pairs, args))
        print(line(scorers[-1]), flush=True)
    if args.groups and len(scorers) < 2:
        raise ValueError("--groups compares groups of people; give a --scorer for each of two or more")
    if args.groups:
        print(groups_line(scorers))
    rows = [{"prompt_id": p.prompt_id, "sample": p.sample, "prompt": p.prompt} for p in pairs]
    result = {"base": str(args.base), "aligned": str(args.aligned), "equal_images": equal}
    result |= {"scorers": scorers, "pairs": rows}
    write_whole(args.out, json.dumps(result, indent=1, allow_nan=False) + "\n")


def _result(spec: str, scorer: Scorer, pairs: Sequence[Pair], args: argparse.Namespace) -> dict[str, Any]:
    from diffalign.report import paired_win_rate
    from reward_models.folder.scoring import score_files

    prompts = [pair.prompt for pair in pairs]
    base, aligned = (
        score_files(scorer, files, prompts, batch_size=args.batch_size, name=spec).tolist()
        for files in ([pair.base for pair in pairs], [pair.aligned for pair in pairs])
    )
    return {
        "name": spec,
        "unit": scorer.unit,
        **asdict(paired_win_rate(base, aligned, [pair.prompt_id for pair in pairs], seed=args.seed)),
        "mean_base": sum(base) / len(base),
        "mean_aligned": sum(aligned) / len(aligned),
        "base_scores": base,
        "aligned_scores": aligned,
    }


def equal_line(equal: int, n: int) -> str:
    """What it means that so many of n pairs are the same image twice."""
    if equal < n:
        return f"{equal} of {n} pairs are the same image twice, byte for byte"
    return f"all {n} pairs are the same image twice, byte for byte: both models are one; was the aligned one loaded?"


def groups_line(results: Sequence[dict[str, Any]]) -> str:
    """The mean over groups and the group that gains least, in a line."""
    worst = min(results, key=lambda result: result["win_rate"])
    mean = sum(result["win_rate"] for result in results) / len(results)
    return f"{len(results)} groups: mean win rate {mean:.3f}; the worst off is {line(worst)}"


def line(result: dict[str, Any]) -> str:
    """One scorer's result in a line."""
    rate, low, high = (f"{result[k]:.3f}".removeprefix("0") for k in ("win_rate", "low", "high"))
    return (
        f"{result['name']}: win rate {rate} [{low}, {high}], n {result['n']} pairs, {result['prompts']} prompts, "
        f"mean difference {result['mean_difference']:+.3g} {result['unit']}"
    )


if __name__ == "__main__":
    program.run(main)
