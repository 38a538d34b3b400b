"""Noise schedules: x_t = a(t) x0 + s(t) eps, and what the network predicts. Stateless; arithmetic in float32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffalign.draws import Draws
from diffalign.types import Key


class Prediction(Enum):
    """What the network's output means."""

    EPSILON = "epsilon"
    V = "v_prediction"
    FLOW = "flow"


def _wide(x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return x[:, None, None, None]


@dataclass(frozen=True)
class Schedule(ABC):
    """x_t = a(t) x0 + s(t) eps, with one t a sample."""

    prediction: Prediction

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t [B] -> a [B], s [B]."""

    @abstractmethod
    def sample_timesteps(self, draws: Draws, keys: Sequence[Key]) -> Tensor:
        """Uniform training timesteps keyed by sample, [B]."""

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x0, eps [B, C, h, w] and t [B] -> x_t [B, C, h, w]."""
        a, s = map(_wide, self.coefficients(t))
        return a * x0 + s * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should output, [B, C, h, w]."""
        if self.prediction is Prediction.EPSILON:
            return eps
        if self.prediction is Prediction.FLOW:
            return eps - x0
        a, s = map(_wide, self.coefficients(t))
        return a * eps - s * x0

    def split(self, out: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Network output -> (x0, eps) it implies, both [B, C, h, w]. The only place that knows prediction types."""
        out, x_t = out.float(), x_t.float()
        a, s = map(_wide, self.coefficients(t))
        if self.prediction is Prediction.EPSILON:
            return (x_t - s * out) / a, out
        if self.prediction is Prediction.V:
            return a * x_t - s * out, s * x_t + a * out
        return x_t - s * out, x_t + a * out


@dataclass(frozen=True, eq=False)
class VPSchedule(Schedule):
    """Variance preserving (DDPM, Stable Diffusion): a^2 + s^2 = 1. t is int64 in [0, T - 1]; -1 is the clean end.

    alphas_cumprod  [T] float32: a^2
    clean           a^2 at t = -1: 1, or alphas_cumprod[0] for schedulers with set_alpha_to_one=False
    """

    alphas_cumprod: Tensor
    clean: float = 1.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VPSchedule:
        """From the scheduler config of a diffusers pipeline. Raises ValueError for what is neither eps- nor v-prediction."""
        known = [Prediction.EPSILON.value, Prediction.V.value]
        prediction = config.get("prediction_type", Prediction.EPSILON.value)
        if prediction not in known:
            raise ValueError(f"scheduler prediction_type '{prediction}' is not supported; supported: {', '.join(known)}")
        scheduler = DDIMScheduler.from_config(dict(config))
        return cls(Prediction(prediction), scheduler.alphas_cumprod.float(), float(scheduler.final_alpha_cumprod))

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = torch.cat([self.alphas_cumprod, torch.tensor([self.clean])])  # index -1 is the clean end
        a2 = table.to(t.device)[t]
        return a2.sqrt(), (1 - a2).sqrt()

    def sample_timesteps(self, draws: Draws, keys: Sequence[Key]) -> Tensor:
        return draws.integers(keys, 0, self.num_timesteps, stream="timestep")

    def grid(self, steps: int, spacing: str = "trailing", steps_offset: int = 0) -> Tensor:
        """Descending int64 sampling timesteps [steps], as diffusers spaces them: leading, trailing or linspace."""
        scheduler = DDIMScheduler(self.num_timesteps, timestep_spacing=spacing, steps_offset=steps_offset)
        scheduler.set_timesteps(steps)
        return scheduler.timesteps.clone()


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """Rectified flow: a = 1 - t, s = t, t float in [0, 1], target eps - x0."""

    prediction: Prediction = Prediction.FLOW

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def sample_timesteps(self, draws: Draws, keys: Sequence[Key]) -> Tensor:
        return draws.uniform(keys, stream="timestep")
