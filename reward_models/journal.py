"""Results on disk as they come, so that a killed run loses at most the batch it was in."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from reward_models.scoring import Failed, Result

Key = tuple[str, str]
"""(image, prompt) of an item."""
Outcome = tuple[float, ...] | str
"""The scores of an item, or why it has none."""


class Journal:
    """Appends results to `<out>.partial-<rank>.jsonl`, one JSON object a line after a line with the scorers' names."""

    def __init__(self, out: Path, scorers: Sequence[str], *, rank: int):
        path = out.with_name(f"{out.name}.partial-{rank}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = sum(len(line) for line in _whole_lines(path)) if path.exists() else 0
        self._path, self._scorers, self._file = path, list(scorers), path.open("ab")
        self._file.truncate(whole)  # a kill may have left part of a line
        self._file.seek(whole)

    def append(self, results: Iterable[Result]) -> None:
        """Add a batch of results and hand them to the system: from here on only the machine's own death loses them."""
        if not self._file.tell():
            self._write([{"scorers": self._scorers}])
        self._write(
            {"image": r.item.image, "prompt": r.item.prompt}
            | ({"failed": r.reason} if isinstance(r, Failed) else {"scores": r.scores})
            for r in results
        )

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        empty = not self._file.tell()
        self._file.close()
        if empty:
            self._path.unlink()


def find_journals(out: Path) -> list[Path]:
    """The journals that runs with this `out` left behind, of all their processes."""
    return sorted(out.parent.glob(f"{glob.escape(out.name)}.partial-*.jsonl"))


def read_journals(out: Path, scorers: Sequence[str]) -> dict[Key, Outcome]:
    """Everything that is done. Raises ValueError when it was done with other scorers."""
    outcomes: dict[Key, Outcome] = {}
    for path in find_journals(out):
        header, *lines = _whole_lines(path) or [json.dumps({"scorers": list(scorers)}).encode()]
        before = json.loads(header)["scorers"]
        if before != list(scorers):
            raise ValueError(
                f"'{path}' was begun with --scorer {' --scorer '.join(before)}; give the same in the same order or "
                "delete it"
            )
        for row in map(json.loads, lines):
            outcome = row["failed"] if "failed" in row else tuple(row["scores"])
            outcomes.setdefault((row["image"], row["prompt"]), outcome)
    return outcomes


def remove_journals(out: Path) -> None:
    """Forget them, once the table is written."""
    for path in find_journals(out):
        os.remove(path)


def _whole_lines(path: Path) -> list[bytes]:
    """Lines with their ends; the last one of a killed run may lack it and is left out."""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
