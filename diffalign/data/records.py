"""One record type for every preference data set: a prompt, K images, and which of them people liked better."""

from __future__ import annotations

import functools
import os
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from reward_models.files import one_line, read_file


class ImageRef(NamedTuple):
    """Where the bytes of one image lie: a file, a cell of a parquet file, a file in a zip. Hashable, cheap to pickle.

    path       the image file; the parquet file when `column` is set, the zip file when `member` is
    column     the parquet column
    row_group  the parquet row group
    row        the row within that row group
    member     the name within the zip file

    Parquet is read a row group at a time: cheap in order, slow at random (`data.cache` = off).
    """

    path: str
    column: str | None = None
    row_group: int = 0
    row: int = 0
    member: str | None = None

    def read(self) -> bytes:
        """The encoded image. Raises OSError when it cannot be read, FileNotFoundError when it is not there."""
        if self.member is not None:
            return self._unzip(self.member)
        if self.column is None:
            return read_file(self.path)
        with _lock:
            try:
                value = _cells(self.path, self.row_group, self.column)[self.row].as_py()
            except Exception as error:  # Arrow raises its own, and Python's: a damaged page may say anything
                raise OSError(f"{self} is damaged: {one_line(error)}") from error
        if isinstance(value, dict):  # `datasets.Image` keeps {"bytes", "path"}
            value = value.get("bytes")
        if value is None:
            raise FileNotFoundError(f"{self} is null")
        return value

    def _unzip(self, member: str) -> bytes:
        try:
            with _lock:
                archive = _archive(self.path, os.getpid())
            return archive.read(member)
        except KeyError as error:
            raise FileNotFoundError(f"'{self.path}' holds no {member}") from error
        except Exception as error:  # zipfile lets through whatever a damaged archive makes it stumble over
            raise OSError(f"{self} is damaged: {one_line(error)}") from error

    def __str__(self) -> str:
        if self.member is not None:
            return f"{self.path}:{self.member}"
        if self.column is None:
            return self.path
        return f"{self.path} row group {self.row_group} row {self.row} {self.column}"


# A row group is the smallest thing parquet can read. Readers go in order and use two columns, so two groups of two
# columns are enough; the lock keeps threads from reading the same group several times.
_lock = threading.Lock()


@functools.lru_cache(maxsize=4)
def _cells(path: str, row_group: int, column: str) -> Any:
    with pq.ParquetFile(path, pre_buffer=False) as file:
        return file.read_row_group(row_group, columns=[column], use_threads=False).column(0)


@functools.lru_cache(maxsize=4)
def _archive(path: str, process: int) -> zipfile.ZipFile:
    """An open zip file. `process` keeps a forked one from sharing, and moving, the place where its parent reads."""
    return zipfile.ZipFile(path)


def forget_row_groups() -> None:
    """Free what is kept for the next `ImageRef.read`: parquet row groups can hold hundreds of megabytes."""
    with _lock:
        _cells.cache_clear()
        _archive.cache_clear()


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt with K images and an order among them.

    id         stable name within the data set, whatever else was dropped
    ranks      one number an image, lower is better; a pair has K = 2
    scores     one number an image, larger is better, where the data set gives any
    aspects    the same for each aspect that was rated apart: aspect -> one number an image, larger is better
    annotator  who said so
    flip       probability in [0, 0.5) that the label is wrong; 0 when unknown
    """

    id: str
    prompt: str
    images: tuple[ImageRef, ...]
    ranks: tuple[float, ...]
    scores: tuple[float, ...] | None = None
    annotator: str | None = None
    flip: float = 0.0
    aspects: dict[str, tuple[float, ...]] | None = None

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(winner, loser) positions in `images`, without ties, in a fixed order."""
        for w, rank_w in enumerate(self.ranks):
            for l_, rank_l in enumerate(self.ranks):
                if rank_w < rank_l:
                    yield w, l_


class Dropped(NamedTuple):
    """A record that cannot be used. The reason is `kind` or `kind: detail`; side says which of its images it is about,
    and image where that lies."""

    id: str
    reason: str
    side: str = ""
    image: str = ""

    @property
    def kind(self) -> str:
        return self.reason.split(":")[0]
