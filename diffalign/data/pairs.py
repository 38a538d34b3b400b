"""Preference pairs: a winner and a loser of one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from diffalign.data.latents import Example, PreferenceLatents
from diffalign.data.records import Record


class PreferencePairs(PreferenceLatents):
    """Every ordered pair of a record's images, the winner first; ties make no pair."""

    @staticmethod
    def examples(records: Sequence[Record]) -> Iterator[Example]:
        for record in records:
            scores = record.scores or (float("nan"),) * len(record.images)
            for w, l_ in record.pairs():
                images = (record.images[w], record.images[l_])
                yield Example(
                    f"{record.id}#{w}-{l_}", record.prompt, images, (scores[w], scores[l_]), record.weight, record.flip
                )
