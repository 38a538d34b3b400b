"""Images to score with their prompts, read from a folder, a list or a manifest."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

from reward_models.files import bad_name, leads_out, parse_json, raw_lines, text_lines
from reward_models.images import SUFFIXES, find_images

SOURCES = "give --prompt TEXT, --prompts FILE, a manifest.jsonl in the folder, or x.txt beside each image x.png"


class Item(NamedTuple):
    """One image with its prompt. Repeated items are scored again and get their own rows."""

    image: str  # name in the table, relative to the folder
    prompt: str
    path: Path  # path of the file
    fault: str = ""  # reason why it cannot be scored, if known before reading


class Row(NamedTuple):
    """An image and its prompt from a list, or the reason why the line cannot be used."""

    image: str
    prompt: str
    fault: str = ""


class Items(Sequence[Item]):
    """Compact sequence of items: stores each name, and each distinct prompt once. A million items take about 0.1 GB.

    prompts  prompts of the items, in order
    digest   hash of all names and prompts in order, hexadecimal
    faults   index of an item -> reason why it cannot be scored
    """

    def __init__(self, root: Path, rows: Iterable[Row]):
        self._root = root
        self._names: list[str] = []
        self.prompts: list[str] = []
        self.faults: dict[int, str] = {}
        once: dict[str, str] = {}
        digest = hashlib.sha256()
        for row in rows:
            if fault := row.fault or _unwritable(row):
                self.faults[len(self._names)] = fault
                row = Row(_escaped(row.image), _escaped(row.prompt))
            digest.update(f"{row.image}\0{row.prompt}\0".encode())
            self._names.append(row.image)
            self.prompts.append(once.setdefault(row.prompt, row.prompt))
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name = self._names[index]
        return Item(name, self.prompts[index], self._root / name, self.faults.get(index % len(self), ""))


def _unwritable(row: Row) -> str:
    """Reason why a name or prompt cannot be written to a table; empty if it can."""
    for what, text in (("name", row.image), ("prompt", row.prompt)):
        if reason := bad_name(text):
            return f"bad {what}: {reason}"
    return ""


def _escaped(text: str) -> str:
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def read_items(images: Path, *, prompt: str | None = None, prompts: Path | None = None) -> Items:
    """The images and prompts to score, in order.

    images   a folder, an image, or a list of them: .jsonl or .csv with `image`, relative to the list, and `prompt`
    prompt   the prompt of every image
    prompts  a list with `image`, relative to the folder, and `prompt`; only listed images are scored. Or .txt with one
             prompt per line, for the images in natural order.

    Without both, a folder's manifest.jsonl is used as the list; without a manifest, the prompt of x.png is in x.txt. A
    damaged line of a list becomes an item with a fault. Images of a list may be anywhere, those of a manifest only in
    its folder. Raises FileNotFoundError, and ValueError if prompts are missing or do not match the images, or if no
    line can be used.
    """
    for path in filter(None, (images, prompts)):
        if not path.exists():
            raise FileNotFoundError(f"'{path}' does not exist")
    folder = images if images.is_dir() else images.parent
    if images.suffix.lower() in (".jsonl", ".csv") and images.is_file():
        if prompts is not None:
            raise ValueError(
                f"'{images}' is a list with its own prompts; --prompts can be used with folders and images only"
            )
        rows: Iterable[Row] = _listed(images, prompt)
    elif images.is_dir() and prompt is None and prompts is None and (images / "manifest.jsonl").exists():
        rows = _listed(images / "manifest.jsonl", None, inside=True)
    elif prompts is not None and prompts.suffix.lower() in (".jsonl", ".csv"):
        rows = _listed(prompts, None)
    else:
        rows = _found(images, prompt, prompts)
    items = Items(folder, rows)
    if not items:
        raise ValueError(f"no images in '{images}'; known suffixes: {' '.join(SUFFIXES)}")
    if len(items.faults) == len(items):
        raise ValueError(f"no entry of '{prompts or images}' can be scored: {items[0].image}: {items.faults[0]}")
    return items


def _found(images: Path, prompt: str | None, prompts: Path | None) -> Iterable[Row]:
    """The images of a folder, or one image, with prompts from another source."""
    names = find_images(images) if images.is_dir() else [images.name]
    if prompt is not None:
        return (Row(name, prompt) for name in names)
    if prompts is None:
        return _beside(images if images.is_dir() else images.parent, names)
    if prompts.suffix.lower() != ".txt":
        raise ValueError(f"--prompts must end in .jsonl, .csv or .txt; got '{prompts}'")
    texts = [text.strip() for text in text_lines(prompts)]
    while len(texts) > len(names) and not texts[-1]:
        texts.pop()
    if len(texts) != len(names):
        raise ValueError(f"'{prompts}' has {len(texts)} lines for {len(names)} images in '{images}'")
    return map(Row, names, texts)


def _beside(folder: Path, names: list[str]) -> Iterator[Row]:
    def file(name: str) -> Path:
        return (folder / name).with_suffix(".txt")

    missing = [name for name in names if not file(name).is_file()]
    if missing:
        raise ValueError(f"no prompt for {len(missing)} of {len(names)} images, such as '{missing[0]}'; {SOURCES}")
    for name in names:
        try:
            yield Row(name, "".join(text_lines(file(name))).strip())
        except (OSError, ValueError) as error:
            yield Row(name, "", f"bad prompt: {error}")


def _listed(file: Path, prompt: str | None, *, inside: bool = False) -> Iterator[Row]:
    """Images and prompts of the rows of a list. A given prompt replaces all prompts of the list."""
    for where, row in _csv(file) if file.suffix.lower() == ".csv" else _jsonl(file):
        if isinstance(row, str):
            yield Row(f"{file.name} {where}", "", f"'{file}' {where} {row}")
            continue
        image, text = row.get("image"), row.get("prompt") if prompt is None else prompt
        if not isinstance(image, str) or not image or not isinstance(text, str):
            fault = f"'{file}' {where} needs 'image' and 'prompt'; got {str(row)[:80]}"
            yield Row(image if isinstance(image, str) and image else f"{file.name} {where}", "", fault)
        elif inside and leads_out(image):
            yield Row(image, text, f"'{file}' {where} leads out of its folder")
        else:
            yield Row(image, text)


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Line numbers, each with its object or a description of the error."""
    for number, line in enumerate(raw_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            row = f"is {error}"
        if not isinstance(row, (dict, str)):
            row = f"must be an object; got {line.strip()[:80].decode(errors='replace')}"
        yield f"line {number}", row


def _csv(file: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Number of the last line of each row, with the row or a description of the error.

    Bytes that are not UTF-8 become lone surrogates."""
    reader = csv.DictReader(line.decode(errors="surrogateescape") for line in raw_lines(file))
    try:
        reader.fieldnames  # noqa: B018  # reads the first line
    except csv.Error as error:
        raise ValueError(f"'{file}' line 1 is not CSV: {error}") from error
    while True:
        try:
            row: dict[str, Any] | str = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # such as a field of a hundred thousand characters
            row = f"is not CSV: {error}"
        yield f"line {reader.reader.line_num}", row
