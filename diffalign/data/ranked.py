"""Ranked groups: all images of a prompt, each with the share of the others that it beats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from diffalign.data.latents import Example, PreferenceLatents
from diffalign.data.rankings import PHI
from diffalign.data.records import Record


class RankedImages(PreferenceLatents):
    """One example a record, the scores of its images being win rates phi in [0, 1].

    phi is the aspect of that name, as eval/rank_images.py writes it; without it, the share of the other images that are
    ranked lower. Raises ValueError where it is outside [0, 1].
    """

    @staticmethod
    def examples(records: Sequence[Record]) -> Iterator[Example]:
        for record in records:
            phi = (record.aspects or {}).get(PHI) or win_rates_of_ranks(record.ranks)
            if not all(0 <= x <= 1 for x in phi):
                raise ValueError(
                    f"record {record.id} has phi = {phi}; win rates lie in [0, 1], as eval/rank_images.py writes them; "
                    "without phi they follow from the ranks"
                )
            yield Example(record.id, record.prompt, record.images, tuple(phi), record.flip)


def win_rates_of_ranks(ranks: Sequence[float]) -> tuple[float, ...]:
    """The share of the other images that each is ranked above; lower ranks are better, ties count for neither."""
    return tuple(sum(mine < other for other in ranks) / (len(ranks) - 1) for mine in ranks)
