"""The moving average of the weights, fed after every step."""

from __future__ import annotations

from diffalign.networks.ema import Ema
from diffalign.training.trainer import Hook, Trainer


class Averaging(Hook):
    """Feeds the moving average; must come before the hooks that use it."""

    def __init__(self, ema: Ema):
        self.ema = ema

    def after_step(self, trainer: Trainer) -> None:
        self.ema.step()
