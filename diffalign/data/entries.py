"""What the readers share: the lines of a file, where images lie, and why an entry cannot be used."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.records import Dropped, ImageRef, Record
from reward_models.files import bad_name, is_unicode, leads_out, parse_json, raw_lines

Records = Iterator[Record | Dropped]


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | Dropped]]:
    """(id, object) of every line that is not blank; a Dropped in place of what is no JSON object."""
    for number, text in enumerate(raw_lines(path), 1):
        id = f"{path.name}:{number}"
        if not text.strip():
            continue
        try:
            line = parse_json(text)
        except ValueError as error:
            yield id, Dropped(id, f"bad line: {error}")
            continue
        yield id, line if isinstance(line, dict) else Dropped(id, "bad line: not a JSON object")


def bad_prompt(text: Any) -> str:
    """Why a prompt cannot be used, or nothing."""
    if not isinstance(text, str) or not text.strip():
        return "empty caption"
    return "" if is_unicode(text) else "bad caption: not valid Unicode"


def bad_path(name: str, *, inside: bool = False) -> str:
    """Why no image can lie at this path, or nothing. With inside, it must not lead out of the data set's folder."""
    if reason := bad_name(name):
        return f"bad path: {reason}"
    return f"bad path: '{name[:80]}' leads out of the data set's folder" if inside and leads_out(name) else ""


def bad_label(value: Any, valid: Callable[[float], bool] = math.isfinite) -> str:
    """Why a label cannot be used, or nothing."""
    if value is None or value != value:
        return "missing label"
    try:
        fine = not isinstance(value, bool) and isinstance(value, (int, float)) and valid(float(value))
    except OverflowError:  # an integer of hundreds of digits
        fine = False
    return "" if fine else f"label out of range: {_short(value)}"


def bad_labels(values: Any, count: int, valid: Callable[[float], bool] = math.isfinite) -> str:
    """Why the labels of `count` images cannot be used, or nothing."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        return f"bad entry: needs one label for each of {count} images, got {_short(values)}"
    return next(filter(None, (bad_label(value, valid) for value in values)), "")


def bad_images(id: str, names: Sequence[str], *, inside: bool = False) -> Dropped | None:
    """The first of a record's image paths that cannot be used, as what it makes of the record."""
    for k, name in enumerate(names):
        if reason := bad_path(name, inside=inside):
            return Dropped(id, reason, side_of(k, len(names)))
    return None


def side_of(k: int, count: int) -> str:
    """How the k-th image of a record is called where the layout gives it no better name."""
    return f"image {k + 1} of {count}"


def files(folder: Path, names: Sequence[str]) -> tuple[ImageRef, ...]:
    """The images at paths relative to a folder."""
    place = str(folder)
    return tuple([ImageRef(os.path.join(place, name)) for name in names])  # pathlib's `/` takes ten times as long


def bad_annotator(value: Any) -> str:
    """Why the name or number of a person cannot be used, or nothing."""
    fine = value is None or (isinstance(value, (str, int, float)) and not bad_name(str(value)))
    return "" if fine else f"bad annotator: {_short(value)}"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
