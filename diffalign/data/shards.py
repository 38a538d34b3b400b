"""Rows of numbers on disk under string keys, in shards that are whole or not there.

A shard is a `.rows` file, its rows one after the other, and a `.json` file with their keys, the fields of a row and a
check sum for each. Each file is written under a temporary name and renamed, the `.json` last: a shard without it does
not exist. A shard's name follows from its keys, so processes that do the same work write the same files, and one that
was killed leaves nothing in the way. Several shards may hold the same key; any of them will do.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from reward_models.files import read_json, write_whole

EXACT = ("size", "guidance")
"""Fields of a Cond whose values mean pixels or scales: float32. Everything else is kept as float16."""
OPEN = 64
"""Shards that a process keeps open. Any number may be read, within the few files that a process is allowed."""
ROWS = 1 << 20
"""More than a shard can hold; a place is shard * ROWS + row."""
logger = logging.getLogger(__name__)


class DamagedEntry(ValueError):
    """An entry of the cache whose bytes are not those that were written."""


class Field(NamedTuple):
    """One part of a row: its name, numpy's name of its type, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


class Rows(NamedTuple):
    """Where the rows of n keys lie. Cheap to pickle; files are opened when first read, and closed again.

    places is int64 [n]: number of the shard in `names` times ROWS, plus the row in it; sums are the rows' check sums.
    """

    folder: str
    names: tuple[str, ...]
    fields: tuple[Field, ...]
    places: np.ndarray
    sums: np.ndarray

    def read(self, i: int) -> dict[str, Tensor]:
        """The fields of key i, float32 [...]. Raises DamagedEntry, and sets the shard aside: it will be made anew."""
        shard, row = divmod(int(self.places[i]), ROWS)
        file, length = f"{self.folder}/{self.names[shard]}.rows", sum(field.bytes for field in self.fields)
        for attempt in range(2):
            data = _files.read(file, row * length, length)
            if zlib.crc32(data) == self.sums[i]:
                return self._split(data)
            if attempt == 0:
                _files.forget(file)  # another process may have made it anew
        Path(file).with_suffix(".json").unlink(missing_ok=True)
        raise DamagedEntry(
            f"row {row} of the cache file '{file}' is damaged; it was set aside, start again (with run.resume=true) "
            "and it is made anew"
        )

    def _split(self, data: bytes) -> dict[str, Tensor]:
        found, place = {}, 0
        for name, dtype, shape in self.fields:
            values = np.frombuffer(data, dtype, math.prod(shape), place).reshape(shape)
            found[name] = torch.from_numpy(values.astype(np.float32))
            place += values.nbytes
        return found


class RepairedRows:
    """Rows whose damaged entries are made anew and kept in memory; in worker processes, which have no encoder, they are
    an error. make gives the fields of a row by its number."""

    def __init__(self, rows: Rows, make: Callable[[int], dict[str, Tensor]]):
        self.rows, self.make = rows, make
        self.made: dict[int, dict[str, Tensor]] = {}

    def read(self, i: int) -> dict[str, Tensor]:
        """The fields of row i. Raises DamagedEntry in worker processes."""
        if i not in self.made:
            try:
                return self.rows.read(i)
            except DamagedEntry as error:
                if get_worker_info() is not None:
                    raise
                logger.warning("%s", f"{error}".partition(";")[0] + ": made anew")
                self.made[i] = self.make(i)
        return self.made[i]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "make": None}


class _Files:
    """Files open for reading; beyond OPEN, the one that was not read for longest is closed."""

    def __init__(self) -> None:
        self.open: OrderedDict[str, int] = OrderedDict()
        self.lock = threading.Lock()

    def read(self, path: str, start: int, length: int) -> bytes:
        """`length` bytes; fewer, or none, where the file is cut short or gone."""
        with self.lock:
            descriptor = self.open.pop(path, None)
            if descriptor is None:
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    return b""
            self.open[path] = descriptor
            if len(self.open) > OPEN:
                os.close(self.open.popitem(last=False)[1])
            return os.pread(descriptor, length, start)  # no seek: forked workers share the place where a file is read

    def forget(self, path: str) -> None:
        with self.lock:
            if path in self.open:
                os.close(self.open.pop(path))


_files = _Files()


class Shards:
    """The shards of one folder. `bad` maps keys that cannot be computed to the reason, `notes` some of the others to
    what is remarkable about them.

    Raises OSError when the folder cannot be written. Shards that are damaged count as absent.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.bad: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self._places: dict[str, int] = {}
        self._names: list[str] = []
        self._sums: list[np.ndarray] = []
        self._fields: tuple[Field, ...] = ()
        self._seen: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self.bad

    def refresh(self) -> None:
        """Take in the shards that other processes have written since."""
        with os.scandir(self.folder) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries}
        for name in sorted(sizes):
            stem, suffix = os.path.splitext(name)
            if suffix == ".json" and stem not in self._seen and not name.startswith("."):
                self._take_in(stem, sizes.get(f"{stem}.rows", 0))

    def _take_in(self, name: str, size: int) -> None:
        try:
            shard = read_json(self.folder / f"{name}.json")
            keys, bad, notes = list(shard["keys"]), dict(shard["bad"]), dict(shard["notes"])
            fields = tuple(Field(x, np.dtype(kind).str, tuple(shape)) for x, kind, shape in shard["fields"])
            sums = np.array(shard["sums"], dtype=np.uint32)
            # Files that someone deleted or copied only in part count as absent and are computed anew.
            if size != len(keys) * sum(field.bytes for field in fields) or len(sums) != len(keys):
                return
            if keys and fields != (self._fields or fields):
                raise ValueError(f"its rows have other fields than those of other shards: {fields}")
        except (OSError, ValueError, LookupError, TypeError) as error:
            logger.warning("the cache file '%s/%s.json' is damaged and left out: %s", self.folder, name, error)
            return
        self._seen.add(name)
        self.bad.update(bad)
        self.notes.update(notes)
        if keys:
            self._fields = fields
            base = len(self._names) * ROWS
            self._names.append(name)
            self._sums.append(sums)
            self._places.update(zip(keys, range(base, base + len(keys)), strict=True))

    def write(
        self,
        keys: Sequence[str],
        rows: Mapping[str, Mapping[str, Tensor]],
        bad: Mapping[str, str],
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Write one shard: rows maps each key that is not bad to its fields.

        Raises ValueError when a number is not finite, OSError when the disk is full or cannot be written.
        """
        name = hashlib.blake2b("\n".join(keys).encode(), digest_size=16).hexdigest()
        good = [key for key in keys if key not in bad]
        columns = {f: stored(f, {key: rows[key][f] for key in good}) for f in rows[good[0]]} if good else {}
        fields = [Field(f, x.dtype.str, x.shape[1:]) for f, x in columns.items()]
        lines = [b"".join(x[k].tobytes() for x in columns.values()) for k in range(len(good))]
        content = {"keys": good, "fields": fields, "sums": [zlib.crc32(line) for line in lines], "bad": dict(bad)}
        try:
            write_whole(self.folder / f"{name}.rows", b"".join(lines))
            write_whole(self.folder / f"{name}.json", json.dumps(content | {"notes": dict(notes or {})}))
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self._take_in(name, sum(map(len, lines)))

    def rows(self, keys: Sequence[str]) -> Rows:
        """Where these keys lie. Raises ValueError when one is missing."""
        missing = sum(key not in self._places for key in keys)
        if missing:
            raise ValueError(
                f"{missing} of {len(keys)} entries are missing from the cache '{self.folder}' just after it was built; "
                "it must be a folder that every process sees and that nobody empties meanwhile ('data.cache')"
            )
        places = np.fromiter((self._places[key] for key in keys), dtype=np.int64, count=len(keys))
        starts = np.cumsum([0, *(len(x) for x in self._sums)])
        sums = np.concatenate([np.zeros(0, np.uint32), *self._sums])[starts[places // ROWS] + places % ROWS]
        return Rows(str(self.folder), tuple(self._names), self._fields, places, sums)


def stored(field: str, values: Mapping[str, Tensor]) -> np.ndarray:
    """One field of many rows as it is kept. Raises ValueError when a number is not finite."""
    exact = torch.stack([value.detach().cpu().float() for value in values.values()])
    kept = exact if field in EXACT else exact.to(torch.float16)
    if not torch.isfinite(kept).all():
        key = next(k for k, row in zip(values, kept, strict=True) if not torch.isfinite(row).all())
        raise ValueError(
            f"the encoder gave '{field}' of '{key}' that is not finite or too large for float16; load it in another "
            "precision ('backbone.dtype' = fp32), some autoencoders overflow in half precision"
        )
    return kept.contiguous().numpy()


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"cannot write the cache in '{folder}' ({error}); free space there, or set 'data.cache' to another folder"
    )
