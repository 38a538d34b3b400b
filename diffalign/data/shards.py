"""Arrays on disk under string keys, in shards that are whole or not there.

A shard is one `.npy` file a field (memory-mapped when read) and a `.json` file that names its keys. Each file is
written under a temporary name and renamed, the `.json` last: a shard without it does not exist. A shard's name follows
from its keys, so processes that do the same work write the same files, and one that was killed leaves nothing in the
way. Several shards may hold the same key; any of them will do.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EXACT = ("size", "guidance")
"""Fields of a Cond whose values mean pixels or scales: float32. Everything else is kept as float16."""


class Rows(NamedTuple):
    """Where the rows of n keys lie. Cheap to pickle; files are opened when first read, once a process.

    places is int32 [n, 2]: number of the shard in `names`, row in it.
    """

    folder: Path
    names: tuple[str, ...]
    fields: tuple[str, ...]
    places: np.ndarray

    def read(self, i: int) -> dict[str, Tensor]:
        """The fields of key i, float32 [...]."""
        shard, row = self.places[i]
        files = {field: self.folder / f"{self.names[shard]}.{field}.npy" for field in self.fields}
        return {field: torch.from_numpy(_mapped(file)[row].astype(np.float32)) for field, file in files.items()}


@cache
def _mapped(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False)


class Shards:
    """The shards of one folder. `bad` maps keys that cannot be computed to the reason.

    Raises OSError when the folder cannot be written, ValueError when a shard's list of keys is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.bad: dict[str, str] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._names: list[str] = []
        self._fields: tuple[str, ...] = ()
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
        for file in sorted(self.folder.glob("*.json")):
            if file.stem not in self._seen:
                self._take_in(file)

    def _take_in(self, file: Path) -> None:
        try:
            shard = json.loads(file.read_text())
            keys, sizes, bad = shard["keys"], shard["sizes"], shard["bad"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"the cache file '{file}' is damaged; delete it to compute its entries anew") from error
        arrays = {field: file.with_suffix(f".{field}.npy") for field in sizes}
        # Files that someone deleted or copied only in part count as absent and are computed anew.
        if any(not a.exists() or a.stat().st_size != sizes[field] for field, a in arrays.items()):
            return
        self._seen.add(file.stem)
        self.bad.update(bad)
        self._names.append(file.stem)
        self._fields = tuple(sizes) or self._fields
        for row, key in enumerate(keys):
            if key not in bad:
                self._places[key] = (len(self._names) - 1, row)

    def write(self, keys: Sequence[str], rows: Mapping[str, Mapping[str, Tensor]], bad: Mapping[str, str]) -> None:
        """Write one shard: rows maps each key that is not bad to its fields.

        Raises ValueError when a number is not finite, OSError when the disk is full or cannot be written.
        """
        name = hashlib.blake2b("\n".join(keys).encode(), digest_size=16).hexdigest()
        good = [key for key in keys if key not in bad]
        fields = tuple(rows[good[0]]) if good else ()
        arrays = {f: _array(f, {key: rows[key][f] for key in good}) for f in fields}
        sizes = {}
        for field, array in arrays.items():
            file = self.folder / f"{name}.{field}.npy"
            _write(file, _npy(array))
            sizes[field] = file.stat().st_size
        content = json.dumps({"keys": good, "sizes": sizes, "bad": dict(bad)}).encode()
        _write(self.folder / f"{name}.json", content)
        self._take_in(self.folder / f"{name}.json")

    def rows(self, keys: Sequence[str]) -> Rows:
        """Where these keys lie. Raises ValueError when one is missing."""
        missing = sum(key not in self._places for key in keys)
        if missing:
            raise ValueError(
                f"{missing} of {len(keys)} entries are missing from the cache '{self.folder}' just after it was built; "
                "it must be a folder that every process sees and that nobody empties meanwhile ('data.cache')"
            )
        places = np.array([self._places[key] for key in keys], dtype=np.int32).reshape(-1, 2)
        return Rows(self.folder, tuple(self._names), self._fields, places)


def _array(field: str, values: Mapping[str, Tensor]) -> np.ndarray:
    exact = torch.stack([value.detach().cpu().float() for value in values.values()])
    stored = exact if field in EXACT else exact.half()
    if not torch.isfinite(stored).all():
        key = next(k for k, row in zip(values, stored, strict=True) if not torch.isfinite(row).all())
        raise ValueError(
            f"the encoder gave '{field}' of '{key}' that is not finite or too large for float16; load it in another "
            "precision ('backbone.dtype' = fp32), some autoencoders overflow in half precision"
        )
    return stored.numpy()


def _npy(array: np.ndarray) -> memoryview:
    """The bytes of a .npy file. numpy must not write to the disk itself: its last bytes go lost unnoticed when full."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getbuffer()


def _write(file: Path, content: bytes | memoryview) -> None:
    """Write a file under a temporary name and rename it; nothing half-written remains."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        raise _unwritable(file.parent, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"cannot write the cache in '{folder}' ({error}); free space there, or set 'data.cache' to another folder"
    )
