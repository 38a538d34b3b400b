"""A simulated judge of known accuracy and order bias, a judge of odd answers, a scorer that can be interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.playground import Judge as Exact


class Judge:
    """Compares playground images by the exact judge. It errs in each order independently: right with probability
    `first` if the better image is shown first, with `second` if it is shown second. The last bits of an image decide
    about its errors, so that they do not depend on the order of calls."""

    differentiable, unit = False, "points"

    def __init__(self, *, first: float, second: float):
        self.first, self.second, self.exact = first, second, Exact()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.exact.score(images, prompts)

    def votes(self, first: Tensor, second: Tensor, prompts: Sequence[str]) -> Tensor:
        better = self.score(first, prompts) > self.score(second, prompts)
        seed = int((first.sum() * 1e4 + second.sum() * 1e4).item())
        luck = torch.rand(len(prompts), 2, generator=torch.Generator().manual_seed(seed))
        right = torch.tensor([[self.second, self.first], [self.first, self.second]])[better.long()]
        return (better[:, None] == (luck < right)).float()


class Brightness:
    """Mean of the pixels. Counts the images it is given, and fails at call number `Brightness.stop`."""

    differentiable, unit = True, "level"
    images: ClassVar[int] = 0
    calls: ClassVar[int] = 0
    stop: ClassVar[int] = -1

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if Brightness.calls == Brightness.stop:
            raise OSError("the machine is switched off")
        Brightness.calls += 1
        Brightness.images += len(images)
        return images.mean((1, 2, 3))


class Odd:
    """Its votes or scores are no valid ones. `nan`: no vote on the first pair of each call."""

    differentiable, unit = False, "level"

    def __init__(self, *, votes: str):
        self.kind = votes

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))[: -1 if self.kind == "short" else None]

    def votes(self, first: Tensor, second: Tensor, prompts: Sequence[str]) -> object:
        better = (first.mean((1, 2, 3)) > second.mean((1, 2, 3))).float()
        votes = torch.stack([better, better], 1)
        if self.kind == "nan" and len(votes) > 1:
            votes[0, 0] = torch.nan
        return {"soft": votes * 0.6 + 0.2, "flat": better, "list": votes.tolist()}.get(self.kind, votes)
