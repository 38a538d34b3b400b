"""The parts of a reward card."""

from __future__ import annotations

from dataclasses import dataclass

UNKNOWN = "unverified"


@dataclass(frozen=True)
class Accuracy:
    """A published accuracy on human choices: data set, percent, and source."""

    data: str
    percent: float
    source: str


@dataclass(frozen=True)
class Card:
    """Content of `reward-score info NAME`."""

    title: str
    source: str
    licence: str
    architecture: str
    images: str
    prompts: str
    unit: str
    typical: str
    accuracies: tuple[Accuracy, ...]
    failures: tuple[str, ...]
