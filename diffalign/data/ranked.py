"""Ranked groups: all images of a prompt with their win rates against the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from diffalign.data.examples import Example
from diffalign.data.latents import PreferenceLatents
from diffalign.data.rankings import PHI
from diffalign.data.records import Record


class RankedImages(PreferenceLatents):
    """Ranked groups of images: one example per record, with win rates phi in [0, 1] as scores.

    phi is the aspect "phi" of the record, which eval/rank_images.py writes. Without it, phi is computed from the ranks:
    the share of the other images that are ranked worse. Raises ValueError when phi is outside [0, 1].
    """

    unit = "groups"

    @staticmethod
    def examples(records: Sequence[Record]) -> Iterator[Example]:
        for record in records:
            phi = (record.aspects or {}).get(PHI) or win_rates_of_ranks(record.ranks)
            if not all(0 <= x <= 1 for x in phi):
                raise ValueError(
                    f"record {record.id} has phi = {phi}; win rates must be in [0, 1], as "
                    "eval/rank_images.py writes them; without phi they are computed from the ranks"
                )
            yield Example(record.id, record.prompt, record.images, tuple(phi), record.flip)


def win_rates_of_ranks(ranks: Sequence[float]) -> tuple[float, ...]:
    """Win rate of each image: the share of the others with a worse (larger) rank. Ties are no win."""
    return tuple(sum(rank < other for other in ranks) / (len(ranks) - 1) for rank in ranks)
