"""Which records can be used: reading them, setting aside what is damaged, and saying so."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from diffalign.data.entries import side_of
from diffalign.data.image_checks import ImageCheck
from diffalign.data.readers import read_records
from diffalign.data.records import Dropped, ImageRef, Record
from reward_models.files import write_lines

logger = logging.getLogger(__name__)

Verify = Callable[[Sequence[Record], Sequence[ImageRef]], None]
"""What is told of the records and images of a data set before any image is read; it may refuse them."""
NO_PREFERENCE = ("tie", "not labelled")
"""Records that say nothing about preference. They are listed like damaged ones but do not count as damage: one record
in eight of Pick-a-Pic is a tie."""


def read_some(path: str, limit: int | None) -> tuple[list[Record], list[Dropped]]:
    """The first `limit` usable records of a data set, or all, and what had to be dropped on the way."""
    records: list[Record] = []
    dropped: list[Dropped] = []
    for one in read_records(path):
        if isinstance(one, Dropped):
            dropped.append(one)
        else:
            records.append(one)
            if len(records) == limit:
                break
    return records, dropped


def usable_records(records: Sequence[Record], seen: dict[ImageRef, ImageCheck]) -> tuple[list[Record], list[Dropped]]:
    """Split off the records with an image that cannot be used, or with the same image as winner and loser."""
    usable, dropped = [], []
    for record in records:
        images = [seen[ref] for ref in record.images]
        bad = next((k for k, image in enumerate(images) if image.reason), None)
        if bad is not None:
            dropped.append(Dropped(record.id, images[bad].reason, _side(record, bad), str(record.images[bad])))
        elif any(images[w].digest == images[l_].digest for w, l_ in record.pairs()):
            dropped.append(Dropped(record.id, "identical images"))
        else:
            usable.append(record)
    return usable, dropped


class Notice(NamedTuple):
    """A record that is used although something about it is strange: `kind` or `kind: detail`."""

    id: str
    notice: str


def notices_of(records: Sequence[Record], seen: dict[ImageRef, ImageCheck]) -> Iterator[Notice]:
    """Preferences that come twice, by the same person or nobody named, or also the other way round; tiny images."""
    first: dict[int, int] = {}
    for number, record in enumerate(records):
        images = [seen[ref] for ref in record.images]
        for k, image in enumerate(images):
            if image.note:
                yield Notice(record.id, f"tiny image: {_side(record, k)} is {image.note}")
        found = {"duplicate": -1, "both directions": -1}
        for w, l_ in record.pairs():
            better, worse = images[w].digest, images[l_].digest
            said = hash((record.prompt, better, worse))  # not the texts: a million of them would take gigabytes
            same = first.setdefault(hash((said, record.annotator)), number)
            first.setdefault(said, number)
            other = first.get(hash((record.prompt, worse, better)), number)
            found["duplicate"] = same if same < number else found["duplicate"]
            found["both directions"] = other if other < number else found["both directions"]
        for kind, before in found.items():
            if before >= 0:
                yield Notice(record.id, f"{kind}: {records[before].id}")


def trained_on(records: Sequence[Record], path: str | None) -> Iterator[Notice]:
    """Validation records whose prompts are also those of training, read from `path`."""
    if path is not None:
        prompts = {one.prompt: one.id for one in read_records(path, keep_ties=True) if isinstance(one, Record)}
        for record in records:
            if record.prompt in prompts:
                yield Notice(record.id, f"prompt of training: {prompts[record.prompt]}")


def _side(record: Record, k: int) -> str:
    if len(record.images) == 2 and record.ranks[0] != record.ranks[1]:
        return "chosen" if record.ranks[k] == min(record.ranks) else "rejected"
    return side_of(k, len(record.images))


class DropReport:
    """Lists what was dropped, and stops the run when it is too much."""

    def __init__(self, file: Path, main: bool, path: str, max_dropped: float):
        self.file, self.main, self.path, self.max_dropped = file, main, path, max_dropped

    def stop_if_damaged(self, usable: int, dropped: Sequence[Dropped]) -> None:
        """Write the list. Raises ValueError when more than max_dropped is damaged or nothing is left."""
        if self.main:
            rows = ({name: value for name, value in d._asdict().items() if value} for d in dropped)
            write_lines(self.file, rows)
        damaged = sum(d.kind not in NO_PREFERENCE for d in dropped)
        if not usable:
            raise ValueError(f"no usable pair in '{self.path}' ({_counts(dropped)}); see '{self.file}'")
        share = damaged / (usable + damaged)
        if share > self.max_dropped:
            raise ValueError(
                f"{damaged} of {usable + damaged} records of '{self.path}' ({share:.1%}) are damaged, more than "
                f"'data.max_dropped' = {self.max_dropped} ({_counts(dropped)}); see '{self.file}'"
            )

    def summary(self, usable: int, pairs: int, dropped: Sequence[Dropped]) -> None:
        """One line in the log: a warning when something was dropped."""
        if self.main:
            level = logging.WARNING if dropped else logging.INFO
            what = f"; dropped {len(dropped)} ({_counts(dropped)}), listed in '{self.file}'" if dropped else ""
            logger.log(level, "%d pairs from %d records of '%s'%s", pairs, usable, self.path, what)

    def notice(self, notices: Callable[[], Iterable[Notice]]) -> None:
        """List what is strange but used, and say how much it is, in one line; nothing where nothing is."""
        if not self.main:
            return
        found = list(notices())
        file = self.file.with_name(self.file.name.replace("dropped", "notices"))
        if not found:
            file.unlink(missing_ok=True)
            return
        write_lines(file, (one._asdict() for one in found))
        logger.warning(
            "of the records used, %s; listed in '%s'", _kinds(one.notice.split(":")[0] for one in found), file
        )


def _counts(dropped: Sequence[Dropped]) -> str:
    return _kinds(d.kind for d in dropped) or "it is empty"


def _kinds(kinds: Iterable[str]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in Counter(kinds).most_common())
