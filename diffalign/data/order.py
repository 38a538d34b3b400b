"""Order of the samples of all ranks: micro-batches of one bucket each, as a function of (seed, number) only."""

from __future__ import annotations

from itertools import count

import numpy as np

from diffalign.draws import Draws


class Order:
    """Numbered micro-batches of a data set of n samples, without end. Every sample occurs once in each epoch.

    The samples are a stream: one permutation per epoch 0, 1, ... Each one waits in its bucket, and whenever B samples
    wait in a bucket, they are the next micro-batch. So a micro-batch may hold samples of several epochs, and samples
    left at the end of an epoch come first in the next one. Without buckets it is the stream in pieces of B.

    buckets  int [n], bucket of each sample; None means one bucket
    counts   number of samples in each bucket
    """

    def __init__(self, draws: Draws, n: int, batch_size: int, buckets: np.ndarray | None = None):
        self.draws, self.n, self.batch_size = draws, n, batch_size
        self.buckets = None if buckets is None else np.asarray(buckets)
        self.counts: list[int] = [n] if self.buckets is None else np.bincount(self.buckets).tolist()
        self._epochs: dict[int, list[np.ndarray]] = {}
        self._filled: tuple[int, int, list[tuple[int, int]]] = (-1, 0, [])

    def at(self, number: int) -> tuple[int, int]:
        """Bucket of a micro-batch, and its number k among those of this bucket."""
        if len(self.counts) == 1:
            return 0, number
        _, before, filled = self._filled
        if not before <= number < before + len(filled):
            # No epoch before this one is long enough, since samples that still wait are in no micro-batch.
            first = number * self.batch_size // self.n
            epoch = next(e for e in count(first) if self._before(e + 1) > number)
            before, filled = self._before(epoch), self._fill(epoch)
            self._filled = (epoch, before, filled)
        return filled[number - before]

    def samples(self, bucket: int, k: int) -> list[tuple[int, int]]:
        """(epoch, index) of the samples of micro-batch k of a bucket."""
        n, start = self.counts[bucket], k * self.batch_size
        places = [divmod(position, n) for position in range(start, start + self.batch_size)]
        needed = {epoch for epoch, _ in places}
        self._epochs = {e: self._samples(e) for e in needed | {self._filled[0]} if e >= 0}
        return [(epoch, int(self._epochs[epoch][bucket][position])) for epoch, position in places]

    def _before(self, epoch: int) -> int:
        """Number of micro-batches that are complete before an epoch."""
        return sum(epoch * n // self.batch_size for n in self.counts)

    def _permutation(self, epoch: int) -> np.ndarray:
        return self.draws.permutation(self.n, key=epoch, stream="order").numpy()

    def _samples(self, epoch: int) -> list[np.ndarray]:
        """Samples of each bucket in the order of an epoch."""
        if epoch in self._epochs:
            return self._epochs[epoch]
        order = self._permutation(epoch)
        if self.buckets is None:
            return [order]
        found = self.buckets[order]
        return [order[found == b] for b in range(len(self.counts))]

    def _fill(self, epoch: int) -> list[tuple[int, int]]:
        """Micro-batches (bucket, k) in the order in which they become complete in an epoch."""
        assert self.buckets is not None
        found = self.buckets[self._permutation(epoch)]
        filled = []
        for b, n in enumerate(self.counts):
            k, waiting = divmod(epoch * n, self.batch_size)
            last = np.flatnonzero(found == b)[self.batch_size - 1 - waiting :: self.batch_size]
            filled += [(place, b, k + i) for i, place in enumerate(last.tolist())]
        return [(b, k) for _, b, k in sorted(filled)]
