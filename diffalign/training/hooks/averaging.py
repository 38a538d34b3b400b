"""Hook that updates the moving average (EMA) of the weights."""

from __future__ import annotations

from diffalign.networks.ema import Ema
from diffalign.training.trainer import Hook, Trainer


class Averaging(Hook):
    """Updates the EMA after every step; must come before the hooks that use it."""

    def __init__(self, ema: Ema):
        self.ema = ema

    def after_step(self, trainer: Trainer) -> None:
        self.ema.step()
