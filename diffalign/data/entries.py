"""What the readers share: the lines of a file, and why an entry cannot be used."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.records import Dropped, Record

Records = Iterator[Record | Dropped]


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | Dropped]]:
    """(id, object) of every line that is not blank; a Dropped in place of what is no JSON object."""
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            id = f"{path.name}:{number}"
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            yield id, line if isinstance(line, dict) else Dropped(id, "bad line: not a JSON object")


def bad_prompt(text: Any) -> str:
    """Why a prompt cannot be used, or nothing."""
    if not isinstance(text, str) or not text.strip():
        return "empty caption"
    return "bad caption: not valid Unicode" if any("\ud800" <= c <= "\udfff" for c in text) else ""


def bad_label(value: Any, valid: Callable[[float], bool] = math.isfinite) -> str:
    """Why a label cannot be used, or nothing."""
    if value is None or value != value:
        return "missing label"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not valid(value):
        return f"label out of range: {value!r}"
    return ""


def bad_labels(values: Any, count: int, valid: Callable[[float], bool] = math.isfinite) -> str:
    """Why the labels of `count` images cannot be used, or nothing."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        return f"bad entry: needs one label for each of {count} images, got {str(values)[:80]}"
    return next(filter(None, (bad_label(value, valid) for value in values)), "")
