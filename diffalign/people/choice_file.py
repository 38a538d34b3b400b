"""The choices of one person between pairs of images, on disk as preference data that `read_records` reads."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from diffalign.data.entry_checks import json_lines
from diffalign.data.records import Dropped
from reward_models.files import write_whole

logger = logging.getLogger(__name__)
Pick = Callable[[Mapping[int, int], Sequence[int]], int]


class Pair(NamedTuple):
    """Two images of a prompt. `id` is the same at every start."""

    id: str
    prompt: str
    images: tuple[Path, Path]

    @property
    def shown(self) -> tuple[int, int]:
        """Which image stands left and which right: by a hash of the id, so that a liking for one side cancels."""
        return (1, 0) if hashlib.sha256(self.id.encode()).digest()[0] % 2 else (0, 1)


@contextmanager
def exclusive(file: Path) -> Iterator[None]:
    """Inside, no other process is in a block of this file. The kernel ends the lock with the process, however it ends.

    Raises ValueError where one is.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(file.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"'{file}' is being written by another `diffalign user choose`; end that one, or choose another --out"
            ) from error
        yield


class ChoiceLog:
    """The choices of one person: an append-only JSONL file and what it says. Threads may share it, processes only one
    after the other: see `exclusive`.

    Beside it lies `<file>.skipped`, the pairs that the person could not tell apart: no name that readers of a folder
    take for data.

    Args:
        file: continued if it is there; a last line that was cut off by a crash is dropped
        pairs: what can be shown
        pick: (answers {index: image preferred}, open indices) -> the index to show next; the first open one without it

    Raises ValueError for a file about other pairs than these.
    """

    def __init__(self, file: Path, pairs: Sequence[Pair], pick: Pick | None = None):
        self.file, self.skips = file, file.with_name(file.name + ".skipped")
        self.pairs, self.pick, self.lock = pairs, pick, threading.RLock()
        self.index = {pair.id: i for i, pair in enumerate(pairs)}
        if len(self.index) < len(pairs):
            raise ValueError(f"{len(pairs)} pairs have {len(self.index)} different ids; each needs its own")
        file.parent.mkdir(parents=True, exist_ok=True)
        self._current: int | None = None
        self.answers: dict[int, int] = {}
        for where, line in _lines(file):
            i = self._find(where, line)
            rows = [self._row(i, image) for image in (0, 1)]
            if line not in rows or i in self.answers:
                wrong = "chooses again in" if line in rows else "has other images than"
                raise ValueError(f"{where} {wrong} pair '{line['pair']}'; delete the line or start another file")
            self.answers[i] = rows.index(line)
        self.skipped = {self._find(where, line) for where, line in _lines(self.skips)}

    def _find(self, where: str, line: Mapping[str, Any]) -> int:
        i = self.index.get(str(line.get("pair")))
        if i is None or line.get("prompt") != self.pairs[i].prompt:
            raise ValueError(
                f"{where} is about pair '{line.get('pair')}' of prompt '{line.get('prompt')}', which is not among "
                f"these {len(self.pairs)} pairs; go on with the prompts and images it was made from, or start another "
                "file"
            )
        return i

    def _row(self, i: int, image: int) -> dict[str, str]:
        pair, folder = self.pairs[i], self.file.parent.resolve()
        # Folders resolved, since `..` does not lead back through a link; the image's own name kept for its suffix.
        paths = [os.path.relpath(path.parent.resolve() / path.name, folder) for path in pair.images]
        return {"prompt": pair.prompt, "chosen": paths[image], "rejected": paths[1 - image], "pair": pair.id}

    @property
    def open(self) -> list[int]:
        """The pairs that are neither answered nor skipped."""
        return [i for i in range(len(self.pairs)) if i not in self.answers and i not in self.skipped]

    @property
    def last(self) -> str | None:
        """The id of the pair answered last."""
        return self.pairs[next(reversed(self.answers))].id if self.answers else None

    def current(self) -> Pair | None:
        """The pair to show: the same until it is answered or skipped. None when no pair is left."""
        with self.lock:
            candidates = self.open
            if self._current is None and candidates:
                picked = self.pick(dict(self.answers), candidates) if self.pick else candidates[0]
                if picked not in candidates:
                    raise ValueError(f"pick gave pair {picked}, which is none of the {len(candidates)} open ones")
                self._current = picked
            return None if self._current is None else self.pairs[self._current]

    def choose(self, id: str, image: int | None) -> bool:
        """Record which image of the pair is the better one; None: cannot tell, and the pair is never shown again.

        False, and nothing is done, when the pair is not open: a second click, another tab.
        """
        with self.lock:
            i = self.index[id]
            if i not in self.open:
                return False
            if image is None:
                _append(self.skips, {"prompt": self.pairs[i].prompt, "pair": id})
                self.skipped.add(i)
            else:
                _append(self.file, self._row(i, image))
                self.answers[i] = image
            self._current = None if i == self._current else self._current
            return True

    def undo(self, id: str) -> bool:
        """Forget the choice in this pair and show it again. False, and nothing is done, when it is not the last one."""
        with self.lock:
            if id != self.last:
                return False
            kept = dict(list(self.answers.items())[:-1])
            _write(self.file, [self._row(i, image) for i, image in kept.items()])
            self.answers, self._current = kept, self.index[id]
            return True


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, object) of every line; what a crash has left of a last line is removed from the file."""
    if not path.exists():
        return []
    lines, whole = list(json_lines(path)), path.read_bytes().endswith(b"\n")
    if lines and isinstance(lines[-1][1], Dropped) and not whole:
        logger.warning("dropped the last line of '%s', which was cut off", path)
        lines.pop()
    found = [(str(path.parent / id), line) for id, line in lines if isinstance(line, dict)]
    if bad := [id for id, line in lines if isinstance(line, Dropped)]:
        raise ValueError(f"{path.parent / bad[0]} is no JSON object; delete the line or start another file")
    if not whole:  # cut off, or an editor's: the next line needs a newline before it
        _write(path, [line for _, line in found])
    return found


def _append(path: Path, row: Mapping[str, str]) -> None:
    """Add a line: it is on the disk when this returns, and no part of it is in the file when this fails."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if path.exists():
            os.truncate(path, size)
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a file so that it is either the old one or the new one."""
    write_whole(path, b"".join(map(_line, rows)))


def _line(row: Mapping[str, str]) -> bytes:
    return json.dumps(row).encode() + b"\n"
