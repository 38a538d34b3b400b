"""Which records can be used: reading them, setting aside what is damaged, and saying so."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from diffalign.data.cache import Seen
from diffalign.data.readers import read_records
from diffalign.data.records import Dropped, ImageRef, Record

logger = logging.getLogger(__name__)

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


def usable_records(records: Sequence[Record], seen: dict[ImageRef, Seen]) -> tuple[list[Record], list[Dropped]]:
    """Split off the records with an image that cannot be used, or with the same image as winner and loser."""
    usable, dropped = [], []
    for record in records:
        images = [seen[ref] for ref in record.images]
        reason = next((image.reason for image in images if image.reason), "")
        if not reason and any(images[w].digest == images[l_].digest for w, l_ in record.pairs()):
            reason = "identical images"
        if reason:
            dropped.append(Dropped(record.id, reason))
        else:
            usable.append(record)
    return usable, dropped


class DropReport:
    """Lists what was dropped, and stops the run when it is too much."""

    def __init__(self, file: Path, main: bool, path: str, max_dropped: float):
        self.file, self.main, self.path, self.max_dropped = file, main, path, max_dropped

    def stop_if_damaged(self, usable: int, dropped: Sequence[Dropped]) -> None:
        """Write the list. Raises ValueError when more than max_dropped is damaged or nothing is left."""
        if self.main:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_name(self.file.name + ".tmp")
            temporary.write_text("".join(json.dumps(d._asdict()) + "\n" for d in dropped), encoding="utf-8")
            os.replace(temporary, self.file)
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


def _counts(dropped: Sequence[Dropped]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in Counter(d.kind for d in dropped).most_common()) or "it is empty"
