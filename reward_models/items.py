"""What to score: images, each with its prompt, from the ways in which people keep them together."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from reward_models.images import SUFFIXES, find_images

SOURCES = "give --prompt TEXT, --prompts FILE, a manifest.jsonl in the folder, or x.txt beside each image x.png"


class Item(NamedTuple):
    """One image with its prompt. Items with equal `image` and `prompt` are the same work."""

    image: str  # as it is called in the table: relative to the folder
    prompt: str
    path: Path  # where it is


def read_items(images: Path, *, prompt: str | None = None, prompts: Path | None = None) -> list[Item]:
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
    if images.suffix.lower() in (".jsonl", ".csv") and images.is_file():
        if prompts is not None:
            raise ValueError(f"'{images}' is a list with prompts of its own; --prompts is for folders and images")
        items = list(_listed(images, images.parent, prompt))
    elif images.is_dir() and prompt is None and prompts is None and (images / "manifest.jsonl").exists():
        items = list(_listed(images / "manifest.jsonl", images, None))
    elif prompts is not None and prompts.suffix.lower() in (".jsonl", ".csv"):
        items = list(_listed(prompts, images if images.is_dir() else images.parent, None))
    else:
        items = _found(images, prompt, prompts)
    if not items:
        raise ValueError(f"no images in '{images}'; known suffixes: {' '.join(SUFFIXES)}")
    for item in items:  # now, and not when the table is written
        try:
            f"{item.image}{item.prompt}".encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"name or prompt of image {item.image!r} is not valid Unicode; rename it") from error
    return items


def _found(images: Path, prompt: str | None, prompts: Path | None) -> list[Item]:
    """The images that lie in a folder, or one image, with prompts from elsewhere."""
    folder = images if images.is_dir() else images.parent
    names = find_images(folder) if images.is_dir() else [images.name]
    if prompt is not None:
        texts = [prompt] * len(names)
    elif prompts is None:
        texts = _beside(folder, names)
    elif prompts.suffix.lower() == ".txt":
        # Not splitlines(): it also splits at characters that may be inside a prompt, and every later one would shift.
        texts = [text.strip() for text in _text(prompts).split("\n")]
        while len(texts) > len(names) and not texts[-1]:
            texts.pop()
        if len(texts) != len(names):
            raise ValueError(f"'{prompts}' has {len(texts)} lines for {len(names)} images in '{images}'")
    else:
        raise ValueError(f"--prompts must end in .jsonl, .csv or .txt; got '{prompts}'")
    return [Item(name, text, folder / name) for name, text in zip(names, texts, strict=True)]


def _beside(folder: Path, names: list[str]) -> list[str]:
    files = [(folder / name).with_suffix(".txt") for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if not file.is_file()]
    if missing:
        raise ValueError(f"no prompt for {len(missing)} of {len(names)} images, first '{missing[0]}'; {SOURCES}")
    return [_text(file).strip() for file in files]


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{file}' is not UTF-8 text: {error}") from error


def _listed(file: Path, root: Path, prompt: str | None) -> Iterator[Item]:
    """The rows of a list. A given prompt stands for all of theirs."""
    for where, row in _csv(file) if file.suffix.lower() == ".csv" else _jsonl(file):
        image, text = row.get("image"), row.get("prompt") if prompt is None else prompt
        if not isinstance(image, str) or not image or not isinstance(text, str):
            raise ValueError(f"'{file}' {where} needs 'image' and 'prompt'; got {str(row)[:80]}")
        yield Item(image, text, root / image)


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_text(file).split("\n"), 1):
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
    reader = csv.DictReader(io.StringIO(_text(file), newline=""))
    for row in reader:
        yield f"line {reader.line_num}", row
