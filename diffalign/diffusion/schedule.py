"""Noise schedules: x_t = a(t) x0 + s(t) eps, and what the network predicts.

Stateless. One timestep a sample, everywhere. Arithmetic in float32 whatever the inputs (float64 stays float64).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Literal

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffalign.draws import Draws
from diffalign.types import Key


class Prediction(Enum):
    """What the network's output means: eps, v = a eps - s x0 (Salimans & Ho, 2022), or the velocity eps - x0."""

    EPSILON = "epsilon"
    V = "v_prediction"
    FLOW = "flow"


ErrorUnit = Literal["native", "epsilon", "x0"]
"""Whose squared error is meant: of what the network predicts, of the noise, or of the clean latent."""

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""The `beta_schedule` values of diffusers that a VPSchedule can be built from."""


def upcast(x: Tensor) -> Tensor:
    """float32, or float64 where x is: no arithmetic here runs in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def per_sample(x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1], to meet latents [B, C, h, w]."""
    return x[:, None, None, None]


class Schedule(ABC):
    """x_t = a(t) x0 + s(t) eps. t is [B], one level a sample; larger is noisier."""

    prediction: Prediction
    t_clean: ClassVar[float]
    """The level without noise, where sampling ends and inversion starts."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t [B] -> a [B], s [B] on t's device."""

    def timesteps(self, levels: Sequence[float]) -> Tensor:
        """Levels as a tensor on the CPU, of the type in which a network is asked at them."""
        return torch.tensor(levels, dtype=torch.float32)

    @abstractmethod
    def at(self, fraction: Tensor) -> Tensor:
        """The timestep [B] that lies at a fraction [B] in [0, 1) of the way from clean to pure noise."""

    @abstractmethod
    def fraction(self, t: Tensor) -> Tensor:
        """How far from clean to pure noise t [B] lies, in [0, 1]."""

    @abstractmethod
    def sample_timesteps(self, draws: Draws, keys: Sequence[Key]) -> Tensor:
        """Uniform training timesteps [B] on the CPU, a pure function of (seed, key); stream "timestep"."""

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x0, eps [B, C, h, w] and t [B] -> x_t [B, C, h, w]."""
        a, s = map(per_sample, self.coefficients(t))
        return a * upcast(x0) + s * upcast(eps)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should output at x_t = a x0 + s eps: [B, C, h, w]."""
        x0, eps = upcast(x0), upcast(eps)
        if self.prediction is Prediction.EPSILON:
            return eps
        if self.prediction is Prediction.FLOW:
            return eps - x0
        a, s = map(per_sample, self.coefficients(t))
        return a * eps - s * x0

    def error_weight(self, t: Tensor, unit: ErrorUnit) -> Tensor:
        """[B]: what turns the squared error of the network's output into that of eps or of x0.

        eps-error = w * error with w = 1 (eps), a^2 (v and flow); x0-error with w = (s / a)^2 (eps), s^2 (v and flow).
        `native` is 1: the network's own target. Not finite for x0 of an eps-prediction where a = 0.
        """
        a, s = self.coefficients(t)
        if unit == "native" or (unit == "epsilon" and self.prediction is Prediction.EPSILON):
            return torch.ones_like(a)
        if unit == "epsilon":
            return a**2
        return (s / a) ** 2 if self.prediction is Prediction.EPSILON else s**2

    def split(self, out: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The (x0, eps) a network output implies, both [B, C, h, w]; the only place that knows prediction types.

        With eps-prediction x0 is not finite where a = 0 (zero terminal SNR): noise alone says nothing about x0.
        """
        out, x_t = upcast(out), upcast(x_t)
        a, s = map(per_sample, self.coefficients(t))
        if self.prediction is Prediction.EPSILON:
            return (x_t - s * out) / a, out
        if self.prediction is Prediction.V:
            return a * x_t - s * out, s * x_t + a * out
        return x_t - s * out, x_t + a * out


@dataclass(frozen=True, eq=False)
class VPSchedule(Schedule):
    """Variance preserving (DDPM, Stable Diffusion): a^2 + s^2 = 1, t in [0, T - 1], and -1 for the clean end.

    t is int64, or float32 for levels between two timesteps, where s / a is linear as in diffusers' Euler schedulers.

    alphas_cumprod  [T]: a^2 at each timestep
    prediction      EPSILON or V; anything else raises ValueError
    clean           a^2 at t = -1: 1, or alphas_cumprod[0] for schedulers with set_alpha_to_one = false
    """

    alphas_cumprod: Tensor
    prediction: Prediction
    clean: float = 1.0
    t_clean: ClassVar[float] = -1
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.prediction is Prediction.FLOW:
            raise ValueError("a VPSchedule predicts EPSILON or V, got FLOW; use FlowSchedule() for flow matching")

    @classmethod
    def from_config(cls, scheduler_config: Mapping[str, Any]) -> VPSchedule:
        """From the scheduler_config.json of a diffusers pipeline, of any scheduler class.

        Raises ValueError for what is no eps- or v-prediction on one of BETA_SCHEDULES (or on `trained_betas`), and for
        eps-prediction on a schedule that ends at zero signal.
        """
        prediction = scheduler_config.get("prediction_type", Prediction.EPSILON.value)
        if prediction not in (Prediction.EPSILON.value, Prediction.V.value):
            raise ValueError(f"scheduler config: prediction_type must be epsilon or v_prediction; got '{prediction}'")
        betas, name = scheduler_config.get("beta_schedule"), scheduler_config.get("_class_name", "unknown class")
        # Without this a flow-matching config, which has no betas, would silently get the default ones.
        if scheduler_config.get("trained_betas") is None and betas not in BETA_SCHEDULES:
            raise ValueError(
                f"scheduler config ({name}): beta_schedule must be one of {', '.join(BETA_SCHEDULES)}; got '{betas}'"
            )
        scheduler = DDIMScheduler.from_config(dict(scheduler_config))
        if prediction == Prediction.EPSILON.value and scheduler.alphas_cumprod[-1] == 0:
            raise ValueError(
                f"scheduler config ({name}): it ends at zero signal (rescale_betas_zero_snr), where an epsilon "
                "prediction says nothing; use v_prediction or switch the rescaling off"
            )
        return cls(scheduler.alphas_cumprod.float(), Prediction(prediction), float(scheduler.final_alpha_cumprod))

    @property
    def num_timesteps(self) -> int:
        """T, 1000 for Stable Diffusion."""
        return len(self.alphas_cumprod)

    def timesteps(self, levels: Sequence[float]) -> Tensor:
        """int64 where all are whole numbers, else float32."""
        timesteps = super().timesteps(levels)
        return timesteps.long() if all(level == int(level) for level in levels) else timesteps

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if t.is_floating_point():
            return self._between(t)
        a2 = self._table(t.device)[t]
        return a2.sqrt(), (1 - a2).sqrt()

    def _table(self, device: torch.device) -> Tensor:
        """a^2 at 0, ..., T - 1 and, at [-1], the clean end; copied to each device once."""
        if device not in self._tables:
            clean = self.alphas_cumprod.new_tensor([self.clean])
            self._tables[device] = torch.cat([self.alphas_cumprod, clean]).to(device)
        return self._tables[device]

    def _between(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and s at float t [B]: sigma = s / a is interpolated between the timesteps on both sides."""
        low = t.floor()
        w = t - low
        (a, s), (a2, s2) = self.coefficients(low.long()), self.coefficients(t.ceil().long())
        # Both times a a2, for with zero terminal SNR the last sigma is infinite.
        signal, noise = a * a2, (1 - w) * s * a2 + w * s2 * a
        norm = torch.hypot(signal, noise)
        return torch.where(w == 0, a, signal / norm), torch.where(w == 0, s, noise / norm)

    def at(self, fraction: Tensor) -> Tensor:
        return (fraction * self.num_timesteps).long().clamp(0, self.num_timesteps - 1)

    def fraction(self, t: Tensor) -> Tensor:
        return (t + 1) / self.num_timesteps

    def sample_timesteps(self, draws: Draws, keys: Sequence[Key]) -> Tensor:
        return draws.integers(keys, 0, self.num_timesteps, stream="timestep")

    def grid(
        self, steps: int, spacing: Literal["leading", "trailing", "linspace"] = "trailing", steps_offset: int = 0
    ) -> Tensor:
        """Descending int64 sampling timesteps [steps], the ones DDIMScheduler of diffusers chooses.

        Raises ValueError for an unknown spacing and for steps or an offset that leave [0, T - 1].
        """
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(f"steps must be in [1, {self.num_timesteps}], the number of timesteps; got {steps}")
        scheduler: Any = DDIMScheduler(self.num_timesteps, timestep_spacing=spacing, steps_offset=steps_offset)
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) != steps:  # its rounding makes one more of 61, 103, ... trailing steps
            raise ValueError(
                f"DDIMScheduler makes {len(scheduler.timesteps)} {spacing} steps of {steps}; use another number"
            )
        if scheduler.timesteps[0] >= self.num_timesteps:
            raise ValueError(
                f"{steps} {spacing} steps with steps_offset {steps_offset} begin at {scheduler.timesteps[0]}, beyond"
                f" the last timestep {self.num_timesteps - 1}; use fewer steps, a smaller offset or trailing spacing"
            )
        return scheduler.timesteps.clone()


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """Rectified flow (Liu et al., 2022; SD3, FLUX): a = 1 - t, s = t, t float in [0, 1]; the target is eps - x0."""

    prediction: Prediction = field(default=Prediction.FLOW, init=False)
    t_clean: ClassVar[float] = 0.0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = upcast(t)
        return 1 - t, t

    def at(self, fraction: Tensor) -> Tensor:
        return fraction.clamp(min=torch.finfo(torch.float32).eps)  # exactly 0 is no noise at all

    def fraction(self, t: Tensor) -> Tensor:
        return t

    def sample_timesteps(self, draws: Draws, keys: Sequence[Key]) -> Tensor:
        return self.at(draws.uniform(keys, stream="timestep"))
