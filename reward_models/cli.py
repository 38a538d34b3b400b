"""The `reward-score` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from reward_models.loading import SCORERS, load_scorer

if TYPE_CHECKING:
    from reward_models.items import Item
    from reward_models.journal import Outcome
    from reward_models.protocol import Scorer

LISTED_FAILURES = 20
DESCRIPTION = """Score images against their prompts with one or more scorers.

  reward-score image.png --prompt "a red cube" --scorer clip --out score.csv
  reward-score images --scorer clip --scorer mine.scorers:Sharpness --out scores.parquet
  reward-score images --prompts prompts.jsonl --scorer clip,model=ViT-L-14,pretrained=openai --out scores.jsonl
  reward-score images --scorer clip,model=local-dir:weights/clip --out scores.csv --resume
  accelerate launch eval/score_folder.py images --scorer clip --out scores.csv     # over all GPUs

IMAGES is a folder (with its subfolders), one image, or a list: .jsonl or .csv with `image` and `prompt`.
Prompts come from --prompt, from --prompts, from the list, from a manifest.jsonl in the folder (as `diffalign eval
generate` writes it), or from x.txt beside x.png; --prompt and --prompts go before what lies in the folder.

Scorers: {scorers}, or your own package.module:Class, a class with `differentiable`, `unit` and
`score(images [B, 3, H, W] in [0, 1], prompts) -> [B]`. Keyword-only constructor parameters are set by `,key=value`.

The table has the columns image, prompt and one for each scorer, in the order of the images; OUT.meta.json holds the
units. While it runs, results go to OUT.partial-*.jsonl, from which --resume continues after a kill.

Exit code: 0 every image was scored; 2 the table is written, but some images could not be read or scored: they are
listed with reasons here and in OUT.failed.jsonl; 1 wrong usage or another error, no table is written.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: {message}; see --help\n")


def main(
    argv: Sequence[str] | None = None, *, rank: int = 0, world: int = 1, wait: Callable[[], None] = lambda: None
) -> int:
    """Entry point; returns the exit code.

    Process `rank` of `world` scores every world-th batch; the first writes the table after `wait`, the barrier. All
    must see the same files.
    """
    args = _parser().parse_args(argv)
    try:
        return _score(args, rank, world, wait)
    except (ValueError, OSError) as error:
        print(f"reward-score: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("reward-score: interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="reward-score",
        description=DESCRIPTION.format(scorers=", ".join(SCORERS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("images", type=Path, metavar="IMAGES", help="folder, image, or list of images with prompts")
    add("--scorer", action="append", required=True, metavar="NAME[,KEY=VALUE...]", help="may be repeated")
    add("--out", type=Path, required=True, metavar="OUT", help="table to write: .csv, .jsonl or .parquet")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the prompt of every image")
    source.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=".jsonl or .csv with image (relative to the folder) and prompt: scores what it lists; or .txt with one "
        "prompt a line, for the images in natural order",
    )
    add("--batch-size", type=_positive, default=32, metavar="B", help="images scored at once (32)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    add("--workers", type=_positive, metavar="N", help="threads that read images (the cores, at most 16)")
    add("--resume", action="store_true", help="keep what an unfinished run with the same OUT has done, and go on")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1; got '{text}'")
    return int(text)


def _score(args: argparse.Namespace, rank: int, world: int, wait: Callable[[], None]) -> int:
    from tqdm import tqdm  # here and below: heavy, and `--help` needs none of it

    from reward_models.items import read_items
    from reward_models.journal import Journal, find_journals, read_journals
    from reward_models.scoring import batches, score_items
    from reward_models.tables import check_table_name

    check_table_name(args.out)
    twice = [name for name in args.scorer if args.scorer.count(name) > 1]
    if twice:
        raise ValueError(f"--scorer {twice[0]} is given twice")
    items = read_items(args.images, prompt=args.prompt, prompts=args.prompts)
    done = read_journals(args.out, args.scorer)
    if done and not args.resume:
        raise ValueError(f"'{find_journals(args.out)[0]}' is left from an unfinished run; add --resume, or delete it")
    scorers = {name: load_scorer(name, args.device) for name in args.scorer}
    wait()  # nobody writes while another still looks at what is done
    mine = batches(list(dict.fromkeys(items)), args.batch_size)[rank::world]
    todo = [batch for batch in mine if not all((item.image, item.prompt) in done for item in batch)]
    bar = tqdm(total=sum(map(len, mine)), desc="reward-score", unit="image", disable=rank > 0)
    with Journal(args.out, args.scorer, rank=rank) as journal, bar:
        bar.update(bar.total - sum(map(len, todo)))
        for results in score_items(todo, scorers, num_workers=args.workers):
            journal.append(r for r in results if (r.item.image, r.item.prompt) not in done)
            bar.update(len(results))
    wait()
    return 0 if rank else _finish(args, items, scorers, read_journals(args.out, args.scorer))


def _finish(
    args: argparse.Namespace, items: Sequence[Item], scorers: dict[str, Scorer], done: dict[tuple[str, str], Outcome]
) -> int:
    """Write the table in the order of the items, print the summary, return the exit code."""
    from reward_models.journal import remove_journals
    from reward_models.scoring import Failed, Scored
    from reward_models.tables import write_failures, write_table

    missing = [item.image for item in items if (item.image, item.prompt) not in done]
    if missing:
        raise ValueError(f"{len(missing)} images have no result, first '{missing[0]}'; run again with --resume")
    outcomes = [(item, done[item.image, item.prompt]) for item in items]
    rows = [Scored(item, x) for item, x in outcomes if not isinstance(x, str)]
    failures = [Failed(item, x) for item, x in outcomes if isinstance(x, str)]
    failed = write_failures(args.out, failures)
    meta: dict[str, Any] = {
        "scorers": {name: {"unit": scorer.unit} for name, scorer in scorers.items()},
        "images": str(args.images),
        "scored": len(rows),
        "failed": len(failures),
        "versions": {name: version(name) for name in ("torch", "torchvision", "pillow")},
    }
    write_table(args.out, list(scorers), rows, meta)
    remove_journals(args.out)
    print(f"{len(rows)} images scored, {len(failures)} failed: '{args.out}'")
    if rows:
        print("\n".join(_summary(rows, scorers)))
    for failure in failures[:LISTED_FAILURES]:
        print(f"reward-score: '{failure.item.image}' is not scored: {failure.reason}", file=sys.stderr)
    if failures:
        print(f"reward-score: {len(failures)} images are not scored, see '{failed}'", file=sys.stderr)
    return 2 if failures else 0


def _summary(rows: Sequence[Any], scorers: dict[str, Scorer]) -> list[str]:
    import numpy as np

    width, lines = max(6, *map(len, scorers)), []
    for k, (name, scorer) in enumerate(scorers.items()):
        x = np.array([row.scores[k] for row in rows])
        numbers = "".join(f"{v:>12.5g}" for v in (x.mean(), x.std(), x.min(), x.max()))
        lines.append(f"{name:<{width}}{numbers}  {scorer.unit}")
    return [f"{'scorer':<{width}}{'mean':>12}{'std':>12}{'min':>12}{'max':>12}  unit", *lines]


if __name__ == "__main__":
    sys.exit(main())
