"""Tiny networks, schedules and batches for the tests of algorithms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loaded import loaded

from diffalign.diffusion.noising import Noising
from diffalign.diffusion.schedule import FlowSchedule, Prediction, Schedule, VPSchedule
from diffalign.draws import Draws
from diffalign.networks.loading import Backbone
from diffalign.objectives.rewards import Rewards
from diffalign.playground.world import captions
from diffalign.types import Cond, LatentBatch, PromptBatch
from reward_models import WeightedSum


class Constant(torch.nn.Module):
    """Predicts the same number everywhere."""

    def __init__(self, value: float):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, x_t, t, cond):
        return self.value.expand_as(x_t)


@pytest.fixture(scope="session")
def constant() -> type[Constant]:
    return Constant


class Affine(torch.nn.Module):
    """Predicts a multiple of x_t plus a number: two weights, so many updates cost nothing."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.tensor([0.5, 0.0]))

    def forward(self, x_t, t, cond):
        return self.weights[0] * x_t + self.weights[1]


@pytest.fixture(scope="session")
def affine() -> type[Affine]:
    return Affine


@pytest.fixture(scope="session")
def schedule_of() -> Callable[[Prediction], Schedule]:
    def make(prediction: Prediction = Prediction.EPSILON) -> Schedule:
        if prediction is Prediction.FLOW:
            return FlowSchedule()
        settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        return VPSchedule.from_config({**settings, "prediction_type": prediction.value})

    return make


@pytest.fixture(scope="session")
def noising_of(schedule_of: Callable[..., Schedule]) -> Callable[..., Noising]:
    """noising_of(Prediction.V, error_weight="epsilon"): seed 0."""

    def make(prediction: Prediction = Prediction.EPSILON, **settings) -> Noising:
        return Noising(schedule_of(prediction), Draws(0), **settings)

    return make


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., LatentBatch]:
    """batch_of([2, 2, 2]): groups with these numbers of images, with tiny_sd's text embeddings.

    All first images come before all second ones.
    """

    def make(sizes: list[int], scores: list[float] | None = None, shape: tuple[int, ...] = (4, 8, 8)) -> LatentBatch:
        g = torch.Generator().manual_seed(1)
        group = torch.tensor([i for k in range(max(sizes)) for i, size in enumerate(sizes) if k < size])
        n = len(sizes)
        return LatentBatch(
            torch.randn(len(group), *shape, generator=g),
            Cond(torch.randn(n, 12, 16, generator=g)),
            group,
            [(0, str(i)) for i in range(n)],
            torch.zeros(n),
            torch.full((len(group),), torch.nan) if scores is None else torch.tensor(scores),
            places=list(range(len(group))),
        )

    return make


class Brightness:
    """A scorer of brightness: the mean of the pixels times `scale`."""

    differentiable, unit = True, "raw"

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def score(self, images, prompts):
        return self.scale * images.mean((1, 2, 3))


@pytest.fixture(scope="session")
def rewards_of() -> Callable[..., Rewards]:
    """rewards_of(backbone.decode, 2.0): Brightness with scale 2."""

    def make(decode, scale: float = 1.0) -> Rewards:
        return Rewards(WeightedSum({"brightness": (Brightness(scale), 1.0)}), decode, lambda values: values)

    return make


@pytest.fixture
def prompts_of() -> Callable[..., PromptBatch]:
    """prompts_of(backbone, 3): a batch of three prompts."""

    def make(backbone, n: int = 2, epoch: int = 0) -> PromptBatch:
        prompts = captions(n, held_out=False)
        return PromptBatch(prompts, backbone.encode_text(prompts), [(epoch, str(i)) for i in range(n)])

    return make


@pytest.fixture
def backbone_of(tiny_sd: Path) -> Callable[..., Backbone]:
    """backbone_of(lora_rank=2): tiny_sd with the settings of load_backbone."""
    return lambda **settings: loaded(tiny_sd, **settings)
