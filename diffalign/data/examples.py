"""Training examples of a data set as flat arrays, which take little memory and can be saved.

Arrays that were saved are memory-mapped, so all processes of a machine share them.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffalign.data.records import ImageRef

NONE = -1
"""Stands for None where a text is given by its number."""


class Example(NamedTuple):
    """One training example: a prompt with K images, the winner first, and a score per image (NaN for none).

    `bucket` is the number of the size to which its images are cropped.
    """

    id: str
    prompt: str
    images: tuple[ImageRef, ...]
    scores: tuple[float, ...]
    flip: float = 0.0
    annotator: str | None = None
    bucket: int = 0


class Column(Sequence[Any]):
    """A list whose items are made when they are asked for."""

    @abstractmethod
    def item(self, i: int) -> Any:
        """Item i, from 0."""

    def __getitem__(self, i: Any) -> Any:
        found = range(len(self))[i]
        return [*map(self.item, found)] if isinstance(found, range) else self.item(found)

    def __iter__(self) -> Iterator[Any]:
        return map(self.item, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    __hash__ = None  # type: ignore[assignment]


class Texts(Column):
    """Texts as UTF-8 bytes `<name>.data`, uint8, and the ends of the texts in them, `<name>.ends`, int64."""

    def __init__(self, arrays: Mapping[str, Tensor], name: str):
        self.data, self.ends = arrays[f"{name}.data"].numpy(), arrays[f"{name}.ends"].numpy()

    def __len__(self) -> int:
        return len(self.ends)

    def item(self, i: int) -> str:
        start = self.ends[i - 1] if i else 0
        return self.data[start : self.ends[i]].tobytes().decode("utf-8", "surrogatepass")


def text_arrays(name: str, texts: Iterable[str]) -> dict[str, Tensor]:
    """The arrays of Texts."""
    data, ends = bytearray(), array("q")
    for text in texts:
        data += text.encode("utf-8", "surrogatepass")
        ends.append(len(data))
    return {f"{name}.data": _tensor(data, torch.uint8), f"{name}.ends": _tensor(ends, torch.int64)}


class Images(Column):
    """Locations of images: int32 [n, 5], the fields of ImageRef with texts by their number in `<name>.texts`."""

    def __init__(self, arrays: Mapping[str, Tensor], name: str):
        self.fields, self.texts = arrays[name].numpy(), Texts(arrays, f"{name}.texts")

    def __len__(self) -> int:
        return len(self.fields)

    def item(self, i: int) -> ImageRef:
        path, column, row_group, row, member = self.fields[i].tolist()
        return ImageRef(self.texts[path], self._text(column), row_group, row, self._text(member))

    def _text(self, number: int) -> str | None:
        return None if number == NONE else self.texts[number]


def image_arrays(name: str, images: Iterable[ImageRef]) -> dict[str, Tensor]:
    """The arrays of Images."""
    texts: dict[str, int] = {}
    fields = array("i")
    for path, column, row_group, row, member in images:
        known = [NONE if x is None else texts.setdefault(x, len(texts)) for x in (path, column, member)]
        fields.extend((known[0], known[1], row_group, row, known[2]))
    return {name: _tensor(fields).view(-1, 5)} | text_arrays(f"{name}.texts", texts)


class Annotators(Column):
    """Name of the annotator of each example, or None, from int32 [n]."""

    def __init__(self, numbers: Tensor, texts: Texts):
        self.numbers = numbers.numpy()
        self.names = {k: texts[k] for k in np.unique(self.numbers).tolist() if k != NONE}

    def __len__(self) -> int:
        return len(self.numbers)

    def item(self, i: int) -> str | None:
        return self.names.get(int(self.numbers[i]))


class Examples:
    """Examples of a data set with their images, prompts (the first is empty) and annotators.

    The arrays are `ids`, `prompts` and `annotators` of Texts; `text` int32 [n], the number of the prompt; `flip` [n];
    `annotator` int32 [n]; `start` int64 [n + 1]: the images of example i have the places start[i] to start[i + 1];
    `member` int32, the number of the image at each place, and its `score`; `bucket` int16 [n]; and those of Images,
    `image`. Images are ordered by bucket: those of bucket b have the numbers first[b] to first[b + 1], int64. An image
    in two buckets has two numbers.
    """

    def __init__(self, arrays: Mapping[str, Tensor]):
        self.ids, self.prompts, self.images = Texts(arrays, "ids"), Texts(arrays, "prompts"), Images(arrays, "image")
        self.annotators = Annotators(arrays["annotator"], Texts(arrays, "annotators"))
        self.texts, self.flips = arrays["text"].numpy(), arrays["flip"].numpy()
        self.starts, self.members, self.scores = (arrays[name].numpy() for name in ("start", "member", "score"))
        self.buckets, self.firsts = arrays["bucket"].numpy(), arrays["first"].tolist()


def example_arrays(examples: Iterable[Example]) -> tuple[dict[str, Tensor], list[ImageRef]]:
    """The arrays of Examples, and their images by number."""
    images: dict[tuple[int, ImageRef], int] = {}
    prompts: dict[str, int] = {"": 0}
    names: dict[str, int] = {}
    text, annotator, member, start = array("i"), array("i"), array("i"), array("q", [0])
    flip, score, bucket = array("f"), array("f"), array("h")

    def ids() -> Iterator[str]:
        for one in examples:
            text.append(prompts.setdefault(one.prompt, len(prompts)))
            annotator.append(NONE if one.annotator is None else names.setdefault(one.annotator, len(names)))
            flip.append(one.flip)
            bucket.append(one.bucket)
            member.extend([images.setdefault((one.bucket, ref), len(images)) for ref in one.images])
            score.extend(one.scores)
            start.append(len(member))
            yield one.id

    found = text_arrays("ids", ids()) | text_arrays("prompts", prompts)
    found |= {"text": _tensor(text), "annotator": _tensor(annotator), "member": _tensor(member)}
    found |= {"start": _tensor(start, torch.int64)}
    found |= {"flip": _tensor(flip, torch.float32), "score": _tensor(score, torch.float32)}
    ordered = sorted(images, key=lambda image: image[0])
    numbers = np.empty(len(images), np.int32)
    numbers[np.array([images[image] for image in ordered], np.int64)] = np.arange(len(images))
    counts = np.bincount(np.array([number for number, _ in ordered], np.int64))
    refs = [ref for _, ref in ordered]
    found |= {"member": torch.from_numpy(numbers[found["member"].numpy()]), "bucket": _tensor(bucket, torch.int16)}
    found |= {"first": torch.tensor([0, *np.cumsum(counts).tolist()])}
    return found | image_arrays("image", refs) | text_arrays("annotators", names), refs


def _tensor(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.frombuffer(values, dtype=dtype) if len(values) else torch.zeros(0, dtype=dtype)
