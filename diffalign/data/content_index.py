"""Which content lies behind an image, known without reading it: by its path, size, and times of change.

What is known lies in files of 32 bytes an image: a digest of where it lies and of its file's size and times, and the
digest of its content. A file that changed has other times and is not found: nothing here is ever wrong, only missing.
Each process adds files of its own; a file is whole or not found.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from diffalign.data.records import ImageRef
from reward_models.files import write_whole

SETTLED, COARSE = 20_000_000, 2_000_000_000
"""Nanoseconds. A file that changed less long ago may change again without its times showing it: clocks of file systems
tick every 10 ms or oftener, some only every second or two, which shows in times of whole seconds."""
FILES, PENDING = 64, 16_384
"""More files are put together into one; so many images are added before a file is written."""
logger = logging.getLogger(__name__)


class ContentIndex:
    """Digests of contents by images, kept in `folder`. Raises OSError when it cannot be written."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        files = [path for path in folder.iterdir() if path.suffix == ".known" and not path.name.startswith(".")]
        rows = np.concatenate([np.zeros((0, 4), np.uint64), *(_load(path) for path in files)])
        self._rows = rows[np.argsort(rows[:, 0], kind="stable")]
        self._pending: list[bytes] = []
        if len(files) > FILES:
            self._write(np.unique(self._rows, axis=0).tobytes())
            for path in files:
                path.unlink(missing_ok=True)

    def find(self, images: Sequence[ImageRef]) -> list[str]:
        """The digest of each image's content, hexadecimal; empty where it is not known."""
        if not len(self._rows):
            return [""] * len(images)
        containers: dict[str, str] = {}
        keys = [self._key(ref, containers) for ref in images]
        asked = np.frombuffer(b"".join(key or bytes(16) for key in keys), np.uint64).reshape(-1, 2)
        places = np.searchsorted(self._rows[:, 0], asked[:, 0]).clip(max=len(self._rows) - 1)
        found = (self._rows[places, :2] == asked).all(axis=1)
        digests = self._rows[places, 2:].tobytes()
        return [digests[16 * i : 16 * i + 16].hex() if yes else "" for i, yes in enumerate(found.tolist())]

    def find_all(self, chunks: Sequence[Sequence[ImageRef]]) -> list[list[str]]:
        """`find` of every chunk, in threads: on a network's disk a look at a file takes long."""
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self.find, chunks))

    def stamp(self, ref: ImageRef) -> bytes | None:
        """To be taken before the image is read, for `add`. None where it could change unnoticed, or does not exist."""
        return self._key(ref, {}, time.time_ns())

    def add(self, stamp: bytes | None, digest: str) -> None:
        """Remember the content, by the stamp that was taken before it was read."""
        if stamp is not None:
            self._pending.append(stamp + bytes.fromhex(digest))
            if len(self._pending) >= PENDING:
                self.save()

    def save(self) -> None:
        """Write what was added."""
        if self._pending:
            self._write(b"".join(self._pending))
            self._pending = []

    def _write(self, rows: bytes) -> None:
        write_whole(self.folder / f"{uuid.uuid4().hex}.known", rows)

    @staticmethod
    def _key(ref: ImageRef, containers: dict[str, str], now: int | None = None) -> bytes | None:
        """A digest of where an image lies and of its file; `containers` keeps that of files with many images. None
        where there is no file, or one that is too young for its times to say much `now`."""
        file = containers.get(ref.path)
        if file is None:
            try:
                status = os.stat(ref.path)
            except (OSError, ValueError):
                return None
            times = (status.st_mtime_ns, status.st_ctime_ns)
            tick = SETTLED if any(t % 10**9 for t in times) else COARSE
            if now is not None and max(times) > now - tick:
                return None
            # Not the time of change alone: it can be set back, as by unpacking an archive; that of the inode cannot.
            file = f"{os.path.abspath(ref.path)}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"
            if ref.column is not None or ref.member is not None:
                containers[ref.path] = file
        where = f"{file}\0{ref.column}\0{ref.row_group}\0{ref.row}\0{ref.member}"
        return hashlib.blake2b(where.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _load(path: Path) -> np.ndarray:
    """The rows uint64 [n, 4] of a file; none where it is gone or damaged: what is not known is read again."""
    with suppress(OSError, ValueError):
        return np.frombuffer(path.read_bytes(), np.uint64).reshape(-1, 4)
    return np.zeros((0, 4), np.uint64)
