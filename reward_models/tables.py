"""Tables of scores: columns image, prompt and one for each scorer, as CSV, JSON lines or parquet."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reward_models.scoring import Failed, Scored

META = b"reward_models"
"""Key of the parquet file's metadata under which lies what `<out>.meta.json` holds."""


def check_table_name(out: Path) -> None:
    """Raise ValueError unless the suffix says which table to write."""
    if out.suffix not in _WRITERS:
        raise ValueError(f"--out must end in {', '.join(_WRITERS)}; got '{out}'")


def write_table(out: Path, names: Sequence[str], rows: Sequence[Scored], meta: dict[str, Any]) -> None:
    """Write the table, and `<out>.meta.json` with its units, each so that it is either whole or not there."""
    text = json.dumps(meta, indent=2, ensure_ascii=False)
    _replace(out.with_name(out.name + ".meta.json"), text.encode() + b"\n")
    _replace(out, _WRITERS[out.suffix](names, rows, text))


def write_failures(out: Path, failures: Sequence[Failed]) -> Path:
    """Write `<out>.failed.jsonl` with image, prompt and reason, or remove it when nothing failed; returns its path."""
    path = out.with_name(out.name + ".failed.jsonl")
    if failures:
        lines = [{"image": f.item.image, "prompt": f.item.prompt, "reason": f.reason} for f in failures]
        _replace(path, _lines(lines))
    else:
        path.unlink(missing_ok=True)
    return path


def _csv(names: Sequence[str], rows: Sequence[Scored], meta: str) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["image", "prompt", *names])
    writer.writerows([row.item.image, row.item.prompt, *row.scores] for row in rows)
    return file.getvalue().encode()


def _jsonl(names: Sequence[str], rows: Sequence[Scored], meta: str) -> bytes:
    columns = ["image", "prompt", *names]
    return _lines([dict(zip(columns, [r.item.image, r.item.prompt, *r.scores], strict=True)) for r in rows])


def _parquet(names: Sequence[str], rows: Sequence[Scored], meta: str) -> bytes:
    columns = {"image": pa.array([r.item.image for r in rows], pa.string())}
    columns["prompt"] = pa.array([r.item.prompt for r in rows], pa.string())
    for k, name in enumerate(names):
        columns[name] = pa.array([r.scores[k] for r in rows], pa.float32())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns).replace_schema_metadata({META: meta.encode()}), sink)
    return sink.getvalue().to_pybytes()


_WRITERS: dict[str, Callable[[Sequence[str], Sequence[Scored], str], bytes]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
