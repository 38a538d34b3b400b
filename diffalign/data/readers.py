"""Preference data sets on disk -> records. The layout is chosen by what lies at the path.

    *.parquet, or a folder of them    Pick-a-Pic: caption, jpg_0, jpg_1, label_0 in {0, 0.5, 1}[, has_label, user_id]
    *.jsonl, or a folder with one     prompt, chosen, rejected[, prob, annotator]; image paths relative to the file
    a folder with w/ and l/           winners and losers under equal names, and prompts.txt or prompts.jsonl
    *.json, or a folder with          HPDv2: prompt, file_path, human_preference (train.json) or
      train.json or test.json         prompt, image_path, rank (test.json)

No reader opens an image: a record says where its images lie.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.records import Dropped, ImageRef, Record
from diffalign.playground import PAIRS

Records = Iterator[Record | Dropped]

EXPECTED = (
    "a .parquet file or a folder of them (Pick-a-Pic columns), a .jsonl file (prompt, chosen, rejected), a folder with "
    "w/, l/ and prompts.txt or prompts.jsonl, or an HPDv2 .json file"
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
logger = logging.getLogger(__name__)


def read_records(path: str | Path) -> Records:
    """Every record of a data set in its own order, and what had to be dropped with its reason.

    Raises FileNotFoundError when nothing lies at the path, ValueError when what lies there is no known layout.
    """
    return find_reader(path)()


def find_reader(path: str | Path) -> Callable[[], Records]:
    """The reader for what lies at the path, without reading it. Raises as `read_records` does."""
    path = PAIRS if str(path) == "playground" else Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no data set at '{path}'; expected {EXPECTED}")
    found = _in_folder(path) if path.is_dir() else _in_file(path)
    if not found:
        raise ValueError(f"'{path}' is no known data set; expected {EXPECTED}")
    if len(found) > 1:
        raise ValueError(f"'{path}' holds several data sets ({', '.join(found)}); give the path of one of them")
    return next(iter(found.values()))


def _in_file(path: Path) -> dict[str, Callable[[], Records]]:
    readers: dict[str, Callable[[], Records]] = {
        ".parquet": partial(read_parquet, [path]),
        ".jsonl": partial(read_jsonl, path),
        ".json": partial(read_hpd, path),
    }
    return {path.name: readers[path.suffix]} if path.suffix in readers else {}


def _in_folder(path: Path) -> dict[str, Callable[[], Records]]:
    found: dict[str, Callable[[], Records]] = {}
    if (path / "w").is_dir() and (path / "l").is_dir():
        found["w/ and l/"] = partial(read_folders, path, _prompts_file(path))
    if shards := _shards(path):
        found["*.parquet"] = partial(read_parquet, shards)
    for file in sorted(path.glob("*.jsonl")):
        if file.name != "prompts.jsonl":
            found[file.name] = partial(read_jsonl, file)
    for name in ("train.json", "test.json"):
        if (path / name).exists() and not any(x.endswith(".json") for x in found):
            found[name] = partial(read_hpd, path / name)
    return found


def _shards(folder: Path) -> list[Path]:
    """The parquet files of a folder; of its train split where it holds several."""
    files = sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))
    splits = {f: m[1] if (m := re.match(r"(.+)-\d{5}-of-\d{5}", f.name)) else "" for f in files}
    if len(set(splits.values())) < 2:
        return files
    if "train" not in splits.values():
        raise ValueError(f"'{folder}' holds the splits {', '.join(sorted(set(splits.values())))}; give one file")
    logger.info("'%s' holds several splits; only train-*.parquet is read", folder)
    return [f for f in files if splits[f] == "train"]


def read_parquet(files: list[Path]) -> Records:
    """Pick-a-Pic v1 and v2: label_0 is 1 where jpg_0 wins, 0 where jpg_1 wins, 0.5 for a tie.

    Streams row groups and reads no image column. Raises ValueError when a file is damaged or lacks a column.
    """
    needed, optional = ["caption", "jpg_0", "jpg_1", "label_0"], ["has_label", "user_id"]
    for path in files:
        try:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                names = file.schema_arrow.names
                if missing := [c for c in needed if c not in names]:
                    raise ValueError(f"'{path}' has no column {', '.join(missing)}; it has {', '.join(names)}")
                columns = ["caption", "label_0"] + [c for c in optional if c in names]
                start = 0
                for group in range(file.num_row_groups):
                    rows = file.read_row_group(group, columns=columns, use_threads=False).to_pylist()
                    for k, row in enumerate(rows):
                        images = tuple(ImageRef(str(path), c, group, k) for c in ("jpg_0", "jpg_1"))
                        yield _pickapic(f"{path.name}:{start + k}", row, images)
                    start += len(rows)
        except pa.ArrowException as error:
            raise ValueError(f"'{path}' is not a readable parquet file: {error}") from error


def _pickapic(id: str, row: dict[str, Any], images: tuple[ImageRef, ...]) -> Record | Dropped:
    if row.get("has_label") is False:
        return Dropped(id, "not labelled")
    label = row["label_0"]
    if reason := _caption(row["caption"]) or _label(label, lambda x: x in (0, 0.5, 1)):
        return Dropped(id, reason)
    annotator = None if row.get("user_id") is None else str(row["user_id"])
    return _ranked(id, row["caption"], images, (1 - label, label), annotator)


def read_jsonl(path: Path) -> Records:
    """One pair a line. `prob` is the probability that `chosen` is really the better one: 0.5 is a tie."""
    for id, line in _lines(path):
        if isinstance(line, Dropped):
            yield line
            continue
        names: list[Any] = [line.get("chosen"), line.get("rejected")]
        prob = line.get("prob", 1.0)
        reason = _caption(line.get("prompt")) or _label(prob, lambda x: 0.5 <= x <= 1)
        if not all(isinstance(n, str) and n for n in names):
            reason = "bad line: 'chosen' and 'rejected' must be image paths"
        if reason:
            yield Dropped(id, reason)
        elif prob == 0.5:
            yield Dropped(id, "tie")
        else:
            images = tuple(ImageRef(str(path.parent / n)) for n in names)
            annotator = None if line.get("annotator") is None else str(line["annotator"])
            yield Record(id, line["prompt"], images, (0.0, 1.0), annotator=annotator, flip=1 - prob)


def read_folders(folder: Path, prompts: Path) -> Records:
    """Winners in w/, losers in l/, under equal names.

    prompts.txt has one prompt a line, in the sorted order of the names that lie in w/ or l/; prompts.jsonl has
    {"image": name, "prompt": text} in any order. Raises ValueError when prompts.txt has another number of lines.
    """
    names = sorted({f.name for side in "wl" for f in (folder / side).iterdir() if f.suffix.lower() in SUFFIXES})
    if prompts.suffix == ".txt":
        # Not splitlines(): it also splits at characters that may be inside a prompt, and every later pair would shift.
        lines = prompts.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        while len(lines) > len(names) and not lines[-1].strip():
            lines.pop()
        if len(lines) != len(names):
            raise ValueError(
                f"'{prompts}' has {len(lines)} lines for {len(names)} images in w/ and l/; give one line an image, in "
                "sorted order, or name the images in prompts.jsonl"
            )
        for name, prompt in zip(names, lines, strict=True):
            yield _folder_pair(folder, name, prompt.rstrip("\r"))
        return
    listed: set[str] = set()
    for id, line in _lines(prompts):
        if isinstance(line, Dropped):
            yield line
        elif not isinstance(line.get("image"), str) or line["image"] in listed:
            yield Dropped(id, f"bad line: 'image' must name one image, once; got {line.get('image')!r}")
        else:
            listed.add(line["image"])
            yield _folder_pair(folder, line["image"], line.get("prompt"))
    yield from (Dropped(name, f"no prompt: not in {prompts.name}") for name in names if name not in listed)


def _folder_pair(folder: Path, name: str, prompt: Any) -> Record | Dropped:
    if reason := _caption(prompt):
        return Dropped(name, reason)
    return Record(name, prompt, tuple(ImageRef(str(folder / side / name)) for side in "wl"), (0.0, 1.0))


def _prompts_file(folder: Path) -> Path:
    found = [folder / name for name in ("prompts.txt", "prompts.jsonl") if (folder / name).exists()]
    if len(found) != 1:
        raise ValueError(f"'{folder}' has w/ and l/ and must have prompts.txt or prompts.jsonl, one of them")
    return found[0]


def read_hpd(path: Path) -> Records:
    """HPDv2: pairs with `human_preference` (1 for the better image) or groups with `rank` (lower is better).

    Images lie beside the file or in its train/ or test/ subfolder. Raises ValueError when the file is no JSON list.
    """
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"'{path}' is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"'{path}' must hold a list of HPDv2 entries, got {type(entries).__name__}")
    folder = _image_folder(path, entries)
    for k, entry in enumerate(entries):
        yield _hpd(f"{path.name}:{k}", entry, folder)


def _hpd(id: str, entry: Any, folder: Path) -> Record | Dropped:
    names = _names(entry)
    labels = entry.get("human_preference", entry.get("rank")) if names else None
    if not names or not isinstance(labels, list) or len(labels) != len(names) or len(names) < 2:
        return Dropped(id, "bad entry: needs file_path and human_preference, or image_path and rank, of equal length")
    pair = "human_preference" in entry
    reason = _caption(entry.get("prompt"))
    for label in labels:
        reason = reason or _label(label, (lambda x: x in (0, 0.5, 1)) if pair else math.isfinite)
    if reason:
        return Dropped(id, reason)
    ranks = tuple(float(1 - x if pair else x) for x in labels)
    return _ranked(id, entry["prompt"], tuple(ImageRef(str(folder / n)) for n in names), ranks)


def _names(entry: Any) -> list[str]:
    names = entry.get("file_path", entry.get("image_path")) if isinstance(entry, dict) else None
    return names if isinstance(names, list) and all(isinstance(n, str) for n in names) else []


def _image_folder(path: Path, entries: list[Any]) -> Path:
    """Where the images are: decided once, by the first image that is found."""
    places = [path.parent / path.stem, path.parent, path.parent / "train", path.parent / "test"]
    names = (name for entry in entries for name in _names(entry))
    return next((place for name in names for place in places if (place / name).is_file()), path.parent)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | Dropped]]:
    """(id, object) of every line that is not blank; a Dropped in place of what is no JSON object."""
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            id = f"{path.name}:{number}"
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            yield id, line if isinstance(line, dict) else Dropped(id, "bad line: not a JSON object")


def _ranked(
    id: str, prompt: str, images: tuple[ImageRef, ...], ranks: tuple[float, ...], annotator: str | None = None
) -> Record | Dropped:
    if len(set(ranks)) == 1:
        return Dropped(id, "tie")
    return Record(id, prompt, images, ranks, annotator=annotator)


def _caption(text: Any) -> str:
    """Why a prompt cannot be used, or nothing."""
    if not isinstance(text, str) or not text.strip():
        return "empty caption"
    return "bad caption: not valid Unicode" if any("\ud800" <= c <= "\udfff" for c in text) else ""


def _label(value: Any, valid: Callable[[float], bool]) -> str:
    """Why a label cannot be used, or nothing."""
    if value is None or value != value:
        return "missing label"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not valid(value):
        return f"label out of range: {value!r}"
    return ""
