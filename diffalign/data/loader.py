"""Endless micro-batches whose order is a function of (seed, position) alone."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from diffalign.draws import Draws
from diffalign.types import on_device


class KeyedDataset(Protocol):
    """What a KeyedLoader reads: items by (epoch, index), drawn by key; see PreferenceLatents."""

    draws_per_sample: int | None
    batch_size: int
    num_workers: int

    def __len__(self) -> int: ...
    def __getitem__(self, place: tuple[int, int]) -> Any: ...
    def collate(self, items: Sequence[Any]) -> Any: ...
    def encode(self, batch: Any) -> Any: ...


class KeyedLoader:
    """This rank's share of the one stream of samples that all ranks read together.

    The stream is the permutations of the data set for epochs 0, 1, ... one after the other. Micro-batch m of rank r
    takes its positions [(m W + r) B, (m W + r + 1) B), so one process with two accumulation steps sees what two
    processes see, and starting anywhere costs nothing.

    batch_size is B, world_size W; num_workers processes prepare batches ahead; batches arrive on `device`.
    """

    def __init__(
        self,
        dataset: KeyedDataset,
        draws: Draws,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        device: torch.device,
    ):
        self.dataset, self.draws, self.batch_size = dataset, draws, batch_size
        self.rank, self.world_size, self.num_workers, self.device = rank, world_size, num_workers, device

    def start(self, micro: int, draw: Callable[[Any], Any] = lambda batch: batch) -> Iterator[Any]:
        """Micro-batches of this rank from number `micro` on, without end; `draw` sees them on the CPU."""
        return self._load(_Stream(self, micro), draw)

    def once(self) -> Iterator[Any]:
        """This rank's share of every example with each of its `draws_per_sample` draws, in fixed order.

        Every rank gets the same number of batches; the last ones begin again at the first example.
        """
        everything = [(k, i) for k in range(self.dataset.draws_per_sample or 1) for i in range(len(self.dataset))]
        chunk = self.batch_size * self.world_size
        everything += everything[: -len(everything) % chunk]
        starts = range(self.rank * self.batch_size, len(everything), chunk)
        return self._load([everything[start : start + self.batch_size] for start in starts], lambda batch: batch)

    def _load(self, places: Iterable[list[tuple[int, int]]], draw: Callable[[Any], Any]) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            self.dataset,  # type: ignore[arg-type]
            batch_sampler=places,  # type: ignore[arg-type]
            collate_fn=self.dataset.collate,
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # otherwise it draws from the global one
            worker_init_fn=_leave_signals_to_the_run,
        )
        for raw in loader:
            batch = self.dataset.encode(raw)
            keys = [tuple(key) for key in batch.keys]  # type: ignore[arg-type]  # older torch pins tuples as lists
            yield on_device(draw(batch._replace(keys=keys)), self.device)


def _leave_signals_to_the_run(worker: int) -> None:
    """A terminal and some cluster managers send them to every process; a step that is to be finished needs its workers,
    which end with their run in any case."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


class _Stream:
    """The (epoch, index) of every sample of this rank's micro-batches from one on."""

    def __init__(self, loader: KeyedLoader, micro: int):
        self.loader, self.micro = loader, micro

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        loader, micro, n = self.loader, self.micro, len(self.loader.dataset)
        orders: dict[int, torch.Tensor] = {}
        while True:
            start = (micro * loader.world_size + loader.rank) * loader.batch_size
            places = [divmod(position, n) for position in range(start, start + loader.batch_size)]
            needed = {epoch for epoch, _ in places}
            orders = {
                e: orders[e] if e in orders else loader.draws.permutation(n, key=e, stream="order") for e in needed
            }
            cycle = loader.dataset.draws_per_sample
            yield [(epoch % cycle if cycle else epoch, int(orders[epoch][k])) for epoch, k in places]
            micro += 1
