"""Result files of the benchmarks, and the names of the processor and the commit."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """A JSON list, one object a line; the file is either the old one or the new one, whole."""
    from reward_models.files import write_whole  # not above: gpu.py finds the packages without an installation

    write_whole(path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


class Kind(NamedTuple):
    """Values that a column may have, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


TEXT = Kind("a text", lambda x: isinstance(x, str))
WHOLE = Kind("a whole number", lambda x: isinstance(x, int) and not isinstance(x, bool))
NUMBER = Kind("a number", _number)
POSITIVE = Kind("a positive number", lambda x: _number(x) and x > 0)
MEASURED = Kind("a number or null", lambda x: x is None or _number(x))
TEXTS = Kind("a list of texts", lambda x: _list(x, TEXT.fits))
ESTIMATE = Kind("a list of a number and its interval", lambda x: _list(x, _number) and len(x) >= 3)
VALUES = Kind("a list of numbers", lambda x: _list(x, _number) and len(x) > 0)
POINTS = Kind("a list of three numbers each", lambda x: _list(x, lambda y: VALUES.fits(y) and len(y) == 3) and x != [])


def read_rows(path: Path, columns: Mapping[str, Kind], some: Mapping[str, Kind] | None = None) -> list[dict[str, Any]]:
    """Rows of a file of `write_rows`, objects with at least these columns; empty if it does not exist.

    `some` are columns that not every row has.

    Raises ValueError with the file, and the row and column that are not as expected; OSError for what is not a file.
    """
    from reward_models.files import read_json  # not above: gpu.py finds the packages without an installation

    if not path.exists():
        return []
    advice = "restore the file from git, or delete it to measure everything again"
    try:
        rows = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from error
    if not isinstance(rows, list):
        raise ValueError(f"'{path}' must hold a list of results; got {_shown(rows)}; {advice}")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"'{path}', result {number} must be an object; got {_shown(row)}; {advice}")
        for name, kind in {**columns, **(some or {})}.items():
            if name not in row:
                if name not in columns:
                    continue
                raise ValueError(f"'{path}', result {number} has no '{name}'; {advice}")
            if not kind.fits(row[name]):
                raise ValueError(
                    f"'{path}', result {number}: '{name}' must be {kind.words}; got {_shown(row[name])}; {advice}"
                )
    return rows


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def commit() -> str | None:
    """The checked out commit, with a mark if files differ from it; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu() -> str:
    """Name of the processor, if the system provides it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()
