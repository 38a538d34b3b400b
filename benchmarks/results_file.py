"""Result files of the benchmarks, and the names of the processor and the commit."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """A JSON list, one object a line; the file is either the old one or the new one, whole."""
    from reward_models.files import write_whole  # not above: gpu.py finds the packages without an installation

    write_whole(path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def read_rows(path: Path) -> list[Any]:
    """Rows of a file of `write_rows`; empty if it does not exist."""
    return json.loads(path.read_text()) if path.exists() else []


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
