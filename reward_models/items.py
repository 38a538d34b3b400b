"""What to score: images, each with its prompt, from the ways in which people keep them together."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

from reward_models.images import SUFFIXES, find_images

SOURCES = "give --prompt TEXT, --prompts FILE, a manifest.jsonl in the folder, or x.txt beside each image x.png"


class Item(NamedTuple):
    """One image with its prompt. The same may come twice: it is then scored twice and has two rows."""

    image: str  # as it is called in the table: relative to the folder
    prompt: str
    path: Path  # where it is


class Items(Sequence[Item]):
    """Many items in little memory: a name each, and each distinct prompt once. A million take about 0.1 GB.

    digest  of all names and prompts in their order, hexadecimal

    Raises ValueError for names and prompts that cannot be written to a table.
    """

    def __init__(self, root: Path, pairs: Iterable[tuple[str, str]]):
        self._root = root
        self._names: list[str] = []
        self._prompts: list[str] = []
        once: dict[str, str] = {}
        digest = hashlib.sha256()
        for name, prompt in pairs:
            try:
                digest.update(f"{name}\0{prompt}\0".encode())
            except UnicodeEncodeError as error:
                raise ValueError(f"name or prompt of image {name!r} is not valid Unicode; rename it") from error
            self._names.append(name)
            self._prompts.append(once.setdefault(prompt, prompt))
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
        return Item(name, self._prompts[index], self._root / name)


def read_items(images: Path, *, prompt: str | None = None, prompts: Path | None = None) -> Items:
    """The images and prompts to score, in order.

    images   a folder, an image, or a list of them: .jsonl or .csv with `image`, relative to the list, and `prompt`
    prompt   of every image
    prompts  a list with `image`, relative to the folder, and `prompt`; then the list says what is scored. Or .txt with
             one prompt a line, for the images in natural order.

    With neither, a folder's manifest.jsonl is its list; without one, the prompt of x.png is read from x.txt.
    Raises FileNotFoundError, and ValueError when prompts are missing or do not fit the images.
    """
    for path in filter(None, (images, prompts)):
        if not path.exists():
            raise FileNotFoundError(f"'{path}' does not exist")
    folder = images if images.is_dir() else images.parent
    if images.suffix.lower() in (".jsonl", ".csv") and images.is_file():
        if prompts is not None:
            raise ValueError(f"'{images}' is a list with prompts of its own; --prompts is for folders and images")
        pairs: Iterable[tuple[str, str]] = _listed(images, prompt)
    elif images.is_dir() and prompt is None and prompts is None and (images / "manifest.jsonl").exists():
        pairs = _listed(images / "manifest.jsonl", None)
    elif prompts is not None and prompts.suffix.lower() in (".jsonl", ".csv"):
        pairs = _listed(prompts, None)
    else:
        pairs = _found(images, prompt, prompts)
    items = Items(folder, pairs)
    if not items:
        raise ValueError(f"no images in '{images}'; known suffixes: {' '.join(SUFFIXES)}")
    return items


def _found(images: Path, prompt: str | None, prompts: Path | None) -> Iterable[tuple[str, str]]:
    """The images that lie in a folder, or one image, with prompts from elsewhere."""
    names = find_images(images) if images.is_dir() else [images.name]
    if prompt is not None:
        return ((name, prompt) for name in names)
    if prompts is None:
        return _beside(images if images.is_dir() else images.parent, names)
    if prompts.suffix.lower() != ".txt":
        raise ValueError(f"--prompts must end in .jsonl, .csv or .txt; got '{prompts}'")
    texts = [text.strip() for text in _lines(prompts)]
    while len(texts) > len(names) and not texts[-1]:
        texts.pop()
    if len(texts) != len(names):
        raise ValueError(f"'{prompts}' has {len(texts)} lines for {len(names)} images in '{images}'")
    return zip(names, texts, strict=True)


def _beside(folder: Path, names: list[str]) -> Iterator[tuple[str, str]]:
    def file(name: str) -> Path:
        return (folder / name).with_suffix(".txt")

    missing = [name for name in names if not file(name).is_file()]
    if missing:
        raise ValueError(f"no prompt for {len(missing)} of {len(names)} images, first '{missing[0]}'; {SOURCES}")
    return ((name, "".join(_lines(file(name))).strip()) for name in names)


def _lines(file: Path) -> Iterator[str]:
    """A text file line by line, with their ends. Only at newlines: str.splitlines also splits at characters that may be
    inside a prompt, and every later one would shift."""
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as text:
            yield from text
    except UnicodeDecodeError as error:
        raise ValueError(f"'{file}' is not UTF-8 text: {error}") from error


def _listed(file: Path, prompt: str | None) -> Iterator[tuple[str, str]]:
    """Image and prompt of the rows of a list. A given prompt stands for all of theirs."""
    for where, row in _csv(file) if file.suffix.lower() == ".csv" else _jsonl(file):
        image, text = row.get("image"), row.get("prompt") if prompt is None else prompt
        if not isinstance(image, str) or not image or not isinstance(text, str):
            raise ValueError(f"'{file}' {where} needs 'image' and 'prompt'; got {str(row)[:80]}")
        yield image, text


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"'{file}' line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"'{file}' line {number} must be an object; got {line.strip()[:80]}")
        yield f"line {number}", row


def _csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(_lines(file))
    for row in reader:
        yield f"line {reader.line_num}", row
