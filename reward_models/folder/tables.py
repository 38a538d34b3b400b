"""Tables row by row: as CSV, JSON lines or parquet, by the suffix; whole or not there."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from reward_models.files import replacing, write_lines, write_whole

META = b"reward_models"
"""Key of the parquet file's metadata that holds the content of `<out>.meta.json`."""
ROW_GROUP = 10_000
"""Rows of a parquet file that are in memory at once."""

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""First characters that a spreadsheet may read as a formula; the last four are their full-width forms."""

Columns = Mapping[str, Literal["string", "float32", "int32"]]
"""Name -> type of a column, in pyarrow's words."""
Rows = Iterable[Sequence[Any]]


def check_table_name(out: Path, option: str = "--out") -> None:
    """Raise ValueError unless the suffix says which table to write."""
    if out.suffix not in _WRITERS:
        raise ValueError(f"{option} must end in {', '.join(_WRITERS)}; got '{out}'")


def write_table(out: Path, columns: Columns, rows: Rows, meta: Mapping[str, Any]) -> None:
    """Write the table, of which little is in memory at any time. Parquet holds `meta` too."""
    with replacing(out) as temporary:
        _WRITERS[out.suffix](temporary, columns, rows, json.dumps(meta, indent=2, ensure_ascii=False))


def write_meta(out: Path, meta: Mapping[str, Any]) -> None:
    """Write `<out>.meta.json`: units, summary, what the numbers depend on."""
    write_whole(out.with_name(out.name + ".meta.json"), json.dumps(meta, indent=2, ensure_ascii=False) + "\n")


def write_failures(out: Path, failures: Collection[Mapping[str, str]]) -> Path:
    """Write `<out>.failed.jsonl` with image, prompt and reason, or remove it when nothing failed; returns its path."""
    path = out.with_name(out.name + ".failed.jsonl")
    if failures:
        write_lines(path, failures)
    else:
        path.unlink(missing_ok=True)
    return path


def _csv(path: Path, columns: Columns, rows: Rows, meta: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        # With "\n" as its line terminator, csv leaves a "\r" in a cell unquoted; readers end the line there.
        writer = csv.writer(SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n") + "\n")))
        writer.writerow(map(_escape_formula, columns))
        writer.writerows(map(_escape_formula, row) for row in rows)


def _escape_formula(cell: Any) -> Any:
    """Text that no spreadsheet takes for a formula (OWASP, CSV injection): an apostrophe before =, +, -, @ and so on.

    Numbers stay as they are.
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def _jsonl(path: Path, columns: Columns, rows: Rows, meta: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n")


def _parquet(path: Path, columns: Columns, rows: Rows, meta: str) -> None:
    schema = pa.schema([pa.field(name, getattr(pa, kind)()) for name, kind in columns.items()], {META: meta.encode()})
    rows = iter(rows)
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, ROW_GROUP)):
            arrays = [pa.array(x, kind) for x, kind in zip(zip(*group, strict=True), schema.types, strict=True)]
            writer.write_table(pa.table(arrays, schema=schema))


_WRITERS: dict[str, Callable[[Path, Columns, Rows, str], None]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
