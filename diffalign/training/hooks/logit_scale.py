"""Hook that clamps CLIP's logit scale while a scorer trains."""

from __future__ import annotations

import math

import torch
from torch import nn

from diffalign.training.trainer import Hook, Trainer


class LimitLogitScale(Hook):
    """Keeps CLIP's logit_scale in [0, ln 100] after each step, as CLIP's own training does (Radford et al., 2021)."""

    def __init__(self, scorer: nn.Module):
        self.scale = scorer.get_parameter("clip.logit_scale")

    @torch.no_grad()
    def after_step(self, trainer: Trainer) -> None:
        self.scale.clamp_(0, math.log(100))
