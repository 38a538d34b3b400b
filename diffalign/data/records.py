"""The record type of all preference data sets: a prompt, K images and their ranks."""

from __future__ import annotations

import functools
import os
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from reward_models.files import one_line, read_file


class ImageRef(NamedTuple):
    """Location of one image: a file, a cell of a table, or a file in a zip. Hashable and cheap to pickle.

    path       the image file; the parquet or arrow file when `column` is set, the zip file when `member` is
    column     the column
    row_group  the row group of a parquet file, the record batch of an arrow file
    row        the row within it
    member     the name within the zip file

    Parquet is read by row group: fast in order, slow in random order (`data.cache` = off).
    """

    path: str
    column: str | None = None
    row_group: int = 0
    row: int = 0
    member: str | None = None

    def read(self) -> bytes:
        """The encoded image. Raises FileNotFoundError when it does not exist, OSError when it is unreadable."""
        if self.member is not None:
            return self._unzip(self.member)
        if self.column is None:
            return read_file(self.path)
        with _lock:
            try:
                value = _cells(self.path, self.row_group, self.column)[self.row].as_py()
            except Exception as error:  # a damaged page raises arbitrary Arrow or Python errors
                raise OSError(f"{self} is damaged: {one_line(error)}") from error
        if isinstance(value, dict):  # `datasets.Image` stores {"bytes", "path"}
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
            raise FileNotFoundError(f"'{self.path}' does not contain {member}") from error
        except Exception as error:  # zipfile raises arbitrary errors for damaged archives
            raise OSError(f"{self} is damaged: {one_line(error)}") from error

    def __str__(self) -> str:
        if self.member is not None:
            return f"{self.path}:{self.member}"
        if self.column is None:
            return self.path
        return f"{self.path} row group {self.row_group} row {self.row} {self.column}"


# A row group is the smallest unit that parquet reads. Readers go in order and use two columns, so a cache of two groups
# of two columns suffices. The lock keeps threads from reading the same group several times.
_lock = threading.Lock()


@functools.lru_cache(maxsize=4)
def _cells(path: str, row_group: int, column: str) -> Any:
    if path.endswith(".arrow"):
        return arrow_batches(path)[row_group].column(column)
    with pq.ParquetFile(path, pre_buffer=False) as file:
        return file.read_row_group(row_group, columns=[column], use_threads=False).column(0)


@functools.lru_cache(maxsize=64)
def arrow_batches(path: str) -> list[pa.RecordBatch]:
    """Record batches of an arrow file, in memory that is mapped to the file: reading one reads its pages only."""
    try:
        with pa.memory_map(path) as file:
            return list(pa.ipc.open_stream(file))
    except pa.ArrowInvalid:
        with pa.memory_map(path) as file:
            reader = pa.ipc.open_file(file)
            return [reader.get_batch(k) for k in range(reader.num_record_batches)]


@functools.lru_cache(maxsize=4)
def _archive(path: str, process: int) -> zipfile.ZipFile:
    """An open zip file, cached per process id: a forked process must not share its parent's file position."""
    return zipfile.ZipFile(path)


def clear_read_caches() -> None:
    """Clear the caches of `ImageRef.read`: parquet row groups can take hundreds of megabytes."""
    with _lock:
        _cells.cache_clear()
        arrow_batches.cache_clear()
        _archive.cache_clear()


@dataclass(frozen=True, slots=True)
class Record:
    """One preference record: a prompt with K ranked images.

    id         stable name within the data set; it does not depend on dropped records
    ranks      one number per image, lower is better; a pair has K = 2
    scores     one number per image, larger is better; None when the data set has none
    aspects    scores of each rated aspect: aspect -> one number per image, larger is better
    annotator  name of the person who chose; None when unknown
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
        """(winner, loser) indices into `images`, without ties, in a fixed order."""
        for w, rank_w in enumerate(self.ranks):
            for l_, rank_l in enumerate(self.ranks):
                if rank_w < rank_l:
                    yield w, l_


class Dropped(NamedTuple):
    """Record that cannot be used.

    reason  `kind` or `kind: detail`
    side    which of its images is the cause, such as chosen or rejected; "" for the whole record
    image   location of that image
    """

    id: str
    reason: str
    side: str = ""
    image: str = ""

    @property
    def kind(self) -> str:
        return self.reason.split(":")[0]
