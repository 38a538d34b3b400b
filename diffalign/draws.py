"""Keyed random numbers: every draw is a pure function of (seed, stream, key).

Draws do not depend on rank, world size or call order. So one process with 8 accumulation steps gets the same draws as 8
processes, and a resumed run continues bit for bit. The error of a frozen reference on a (pair, t, eps) can be cached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from diffalign.types import Key


class Draws:
    """Keyed random numbers, drawn on the CPU in float32, so that they are the same for every device.

    `stream` names the purpose ("noise", "timestep", ...); different streams are independent for the same key.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def generator(self, key: Key, stream: str) -> torch.Generator:
        """A CPU generator whose state depends only on (seed, stream, key)."""
        digest = hashlib.blake2b(repr((self.seed, stream, key)).encode(), digest_size=8).digest()
        # torch accepts seeds in [-2^63, 2^64); 63 bits avoid its remapping of negative seeds.
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def normal(self, keys: Sequence[Key], shape: Sequence[int], *, stream: str) -> Tensor:
        """Standard normal numbers, [len(keys), *shape]."""
        return torch.stack([torch.randn(*shape, generator=self.generator(k, stream)) for k in keys])

    def uniform(self, keys: Sequence[Key], *, stream: str) -> Tensor:
        """Uniform numbers in [0, 1), [len(keys)]."""
        return torch.cat([torch.rand(1, generator=self.generator(k, stream)) for k in keys])

    def integers(self, keys: Sequence[Key], low: int, high: int, *, stream: str) -> Tensor:
        """Uniform integers in [low, high), int64 [len(keys)]."""
        return torch.cat([torch.randint(low, high, (1,), generator=self.generator(k, stream)) for k in keys])

    def permutation(self, n: int, *, key: Key, stream: str) -> Tensor:
        """A random permutation of range(n), int64 [n]."""
        return torch.randperm(n, generator=self.generator(key, stream))


CPU = torch.device("cpu")


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Context manager that seeds torch's global generators and restores their state on exit.

    It covers the CPU generator and that of the current device of `device`'s type. Other devices stay untouched, unlike
    with `torch.manual_seed` and a bare `torch.random.fork_rng()`.
    """
    module = None if device.type == "cpu" else getattr(torch, device.type)
    before = torch.get_rng_state()
    state = module.get_rng_state() if module else None
    torch.default_generator.manual_seed(seed)
    if module:
        module.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
        if module:
            module.set_rng_state(state)
