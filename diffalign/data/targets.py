"""Images that a model should learn to draw: a style, or a subject."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffalign.data.entries import bad_prompt
from diffalign.data.latents import Example, PreferenceLatents, check_latents
from diffalign.data.readers import SUFFIXES
from diffalign.data.records import Dropped, ImageRef, Record


class TargetImages(PreferenceLatents):
    """Single images with their captions, from a folder.

    The captions lie in metadata.jsonl ({"file_name": ..., "text": ...}, the layout of Hugging Face image folders), in a
    .txt file beside each image, or, one for all images as in DreamBooth, in prompt.txt.
    """

    @staticmethod
    def read(path: str, limit: int | None) -> tuple[list[Record], list[Dropped]]:
        found = read_targets(Path(path).expanduser())
        records = [one for one in found if isinstance(one, Record)]
        return records[:limit], [one for one in found if isinstance(one, Dropped)]

    @staticmethod
    def examples(records: Sequence[Record]) -> Iterator[Example]:
        for record in records:
            yield Example(record.id, record.prompt, record.images, (float("nan"),))

    @staticmethod
    def check(cfg: dict[str, Any]) -> list[str]:
        """What cannot work in a `data` section, one line each."""
        problems = [p for p in check_latents(cfg) if not p.startswith("'data.path'")]
        try:
            read_targets(Path(cfg["path"]).expanduser())
        except (FileNotFoundError, ValueError) as error:
            problems.append(f"'data.path': {error}")
        return problems


def read_targets(folder: Path) -> list[Record | Dropped]:
    """A record for each image of the folder, in sorted order.

    Raises FileNotFoundError when it does not exist, ValueError when it holds no images or no captions.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of images at '{folder}'")
    names = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)
    if not names:
        raise ValueError(f"'{folder}' holds no images ({', '.join(SUFFIXES)})")
    one, listed = folder / "prompt.txt", folder / "metadata.jsonl"
    if one.exists():
        captions = dict.fromkeys(names, one.read_text(encoding="utf-8").strip())
    elif listed.exists():
        captions = _metadata(listed)
    else:
        beside = {name: (folder / name).with_suffix(".txt") for name in names}
        captions = {name: f.read_text(encoding="utf-8").strip() for name, f in beside.items() if f.exists()}
        if not captions:
            raise ValueError(f"'{folder}' needs captions: metadata.jsonl, a .txt beside each image, or one prompt.txt")
    found: list[Record | Dropped] = []
    for name in names:
        if reason := bad_prompt(captions.get(name)):
            found.append(Dropped(name, reason))
        else:
            found.append(Record(name, captions[name], (ImageRef(str(folder / name)),), (0.0,)))
    return found


def _metadata(file: Path) -> dict[str, Any]:
    captions: dict[str, Any] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
                captions[row["file_name"]] = row["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"'{file}' line {number} needs file_name and text: {error!r}") from error
    return captions
