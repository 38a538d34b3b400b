"""What an algorithm is: the networks it trains, how batches become training tuples, whose loss is stepped when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from diffalign.types import Key, Metrics, Recent


def check_inner_gradients(**sections: Mapping[str, Any]) -> list[str]:
    """Where these sections ask for float16 although the method takes gradients inside its loss, one line each."""
    return [
        f"'{name}.{key}' = fp16: this method takes gradients inside its loss, which vanish in float16; use bf16"
        for name, cfg in sections.items()
        for key in ("mixed_precision", "dtype")
        if cfg.get(key) == "fp16"
    ]


class Turn(NamedTuple):
    """One optimizer step: whose, and the loss of a micro-batch -> (scalar, detached values to log)."""

    player: str
    loss: Callable[[Any], tuple[Tensor, Metrics]]


class Algorithm(ABC):
    """An alignment method. It knows no optimizer, logger, config or checkpoint.

    players: the trainable networks by name, as prepared by accelerate.
    """

    players: Mapping[str, nn.Module]
    inner_gradients: ClassVar[bool] = False
    """Whether the loss takes gradients itself, which the GradScaler of float16 does not scale."""
    shown: Sequence[str] = ("policy/loss", "policy/accuracy")
    """Metrics beside the progress bar: the loss, and what the method is about."""

    def batches(self, loader: Iterator[Any]) -> Iterator[Any]:
        """Endless training tuples from the loader's micro-batches. Online methods roll out here."""
        return loader

    def draw(self, batch: Any) -> Any:
        """Add what is random about a micro-batch, on the CPU, so that it travels to the device with the rest."""
        return batch

    def turns(self, step: int) -> Sequence[Turn]:
        """The optimizer steps of training step `step`, in order."""
        return (Turn("policy", self.loss),)

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, Metrics]:
        """A micro-batch -> (scalar loss, values to log: scalars or one value a sample)."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the players' weights."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state()`."""
        assert not state

    def keys(self, batch: Any) -> Sequence[Key]:
        """The sample keys of a micro-batch, for error messages."""
        return batch.keys

    def describe(self) -> list[str]:
        """Lines printed before training: what the settings mean."""
        return []

    def verdict(self, recent: Recent) -> str:
        """One line printed after training, from the last tenth of the steps: no more than they can say."""
        return ""
