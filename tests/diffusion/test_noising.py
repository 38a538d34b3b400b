"""Distributions of training timesteps, and weights of errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diffalign.diffusion.noising import Noising, errors
from diffalign.diffusion.schedule import FlowSchedule, Prediction, Schedule, VPSchedule
from diffalign.draws import Draws
from diffalign.types import Cond

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KEYS = [(0, i) for i in range(4000)]


def schedule_of(prediction: Prediction) -> Schedule:
    if prediction is Prediction.FLOW:
        return FlowSchedule()
    return VPSchedule(VPSchedule.from_config(SD).alphas_cumprod.double(), prediction)


def drawn(schedule: Schedule, **settings: Any) -> torch.Tensor:
    return Noising(schedule, Draws(0), **settings).sample(KEYS)


@pytest.mark.parametrize("prediction", list(Prediction))
def test_weighted_errors_are_those_of_the_noise_and_of_the_latent(prediction: Prediction) -> None:
    """A network's output and the true target imply two noises and two latents at the same x_t (float64, random): the
    weighted error is the mean squared difference of either. For flows (1 - s)^2 and s^2, for v abar and 1 - abar.
    """
    schedule, g = schedule_of(prediction), torch.Generator().manual_seed(0)
    x0, eps, out = (torch.randn(3, 4, 5, 5, generator=g, dtype=torch.float64) for _ in range(3))
    flow = prediction is Prediction.FLOW
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64) if flow else torch.tensor([101, 501, 901])
    x_t = schedule.add_noise(x0, eps, t)
    x0_said, eps_said = schedule.split(out, x_t, t)
    expected = {"native": (out, schedule.target(x0, eps, t)), "epsilon": (eps_said, eps), "x0": (x0_said, x0)}
    for unit, (said, true) in expected.items():
        noising = Noising(schedule, Draws(0), error_weight=unit)  # type: ignore[arg-type]
        noised = noising.add(x0, eps, t, Cond(torch.zeros(3, 1, 1)))
        found = errors(lambda *_: out, noised)
        torch.testing.assert_close(found, (said - true).square().mean((1, 2, 3)), rtol=1e-9, atol=1e-12)
    if flow:
        assert torch.allclose(schedule.error_weight(t, "epsilon"), (1 - t) ** 2)


@pytest.mark.parametrize(
    ("prediction", "min_snr", "debiased"),
    [(Prediction.EPSILON, (0.3125, 1.0), (0.25, 4 / 3)), (Prediction.V, (5 / 17, 0.36), (4 / 17, 0.48))],
)
def test_weights_by_signal_to_noise(prediction: Prediction, min_snr: tuple, debiased: tuple) -> None:
    """a^2 = 16/17 has SNR 16: min(16, 5) / 16 = .3125 for eps, 5 / (16 + 1) for v; 1 / sqrt(16) = .25 for eps, and the
    eps error is a^2 times the v error: 16/17 / 4 = 4/17. a^2 = .36 has SNR 9/16 < 5: 1 for eps, SNR / (SNR + 1) = .36
    for v; 1 / sqrt(9/16) = 4/3, and .36 * 4/3 = .48. With gamma = 8, .5 instead of .3125 for eps.
    """
    schedule, t = VPSchedule(torch.tensor([16 / 17, 0.36]).double(), prediction), torch.tensor([0, 1])
    weights = {w: Noising(schedule, Draws(0), error_weight=w) for w in ("min_snr", "debiased")}  # type: ignore[arg-type]
    x0, cond = torch.ones(2, 1, 1, 1), Cond(torch.zeros(2, 1, 1))
    assert weights["min_snr"].add(x0, x0, t, cond).weight.tolist() == pytest.approx(min_snr)
    assert weights["debiased"].add(x0, x0, t, cond).weight.tolist() == pytest.approx(debiased)
    eight = Noising(schedule, Draws(0), error_weight="min_snr", snr_gamma=8.0).add(x0, x0, t, cond).weight
    assert eight[0].item() == pytest.approx(0.5 if prediction is Prediction.EPSILON else 8 / 17)


def test_weights_of_a_flow_by_signal_to_noise() -> None:
    """s = .2, a = .8: SNR 16, x0 error s^2 = .04 of the velocity's: 5 * .04 = .2; (a s) = .16. s = 1: no signal, 0."""
    schedule, t = FlowSchedule(), torch.tensor([0.2, 1.0], dtype=torch.float64)
    assert schedule.error_weight(t, "min_snr").tolist() == pytest.approx([0.2, 0.0])
    assert schedule.error_weight(t, "debiased").tolist() == pytest.approx([0.16, 0.0])
    silent = VPSchedule(torch.tensor([0.0]).double(), Prediction.EPSILON)
    assert silent.error_weight(torch.tensor([0]), "min_snr").tolist() == [1.0]


@pytest.mark.parametrize("prediction", [Prediction.EPSILON, Prediction.FLOW])
def test_levels_follow_their_distribution(prediction: Prediction) -> None:
    """Uniform and logit-normal have median one half; shift 3 moves it to 3 * .5 / (1 + 2 * .5) = .75; mean 1 to
    sigmoid(1) = .731. The middle half of a standard logit-normal lies between sigmoid(-+.6745) = .3375 and .6625.
    """
    schedule = schedule_of(prediction)
    cases: list[tuple[dict[str, Any], float]] = [
        ({}, 0.5),
        ({"shift": 3.0}, 0.75),
        ({"timesteps": "logit_normal"}, 0.5),
    ]
    cases += [({"timesteps": "logit_normal", "mean": 1.0}, 1 / (1 + math.exp(-1)))]
    cases += [({"timesteps": "logit_normal", "shift": 3.0}, 0.75)]
    for settings, median in cases:
        fraction = schedule.fraction(drawn(schedule, **settings)).float()
        assert abs(fraction.median().item() - median) < 0.03, settings
        assert fraction.min() > 0 and fraction.max() <= 1
    middle = schedule.fraction(drawn(schedule, timesteps="logit_normal")).float().quantile(torch.tensor([0.25, 0.75]))
    assert torch.allclose(middle, torch.tensor([0.3375, 0.6625]), atol=0.03)


def test_a_grid_is_uniform_over_its_levels() -> None:
    turbo = drawn(schedule_of(Prediction.EPSILON), timesteps="grid", levels=(249.0, 499.0, 749.0, 999.0))
    values, counts = turbo.unique(return_counts=True)
    assert values.tolist() == [249, 499, 749, 999] and turbo.dtype == torch.int64
    assert counts.min() > 900
    assert drawn(FlowSchedule(), timesteps="grid", levels=(0.25, 1.0)).unique().tolist() == [0.25, 1.0]


def test_draws_depend_only_on_their_keys() -> None:
    noising = Noising(FlowSchedule(), Draws(0), timesteps="logit_normal")
    assert torch.equal(noising.sample(KEYS[:5]).flip(0), noising.sample(KEYS[:5][::-1]))
    assert not torch.equal(noising.sample(KEYS[:5]), Noising(FlowSchedule(), Draws(1)).sample(KEYS[:5]))


def test_impossible_settings_are_listed() -> None:
    good = {"timesteps": "uniform", "mean": 0.0, "std": 1.0, "shift": 1.0, "levels": (), "snr_gamma": 5.0}
    good["error_weight"] = "native"
    assert Noising.check(good) == []
    assert "must be positive" in Noising.check(good | {"shift": 0.0})[0]
    assert "must be positive" in Noising.check(good | {"snr_gamma": 0.0, "error_weight": "min_snr"})[0]
    assert "only with 'noising.error_weight' = min_snr" in Noising.check(good | {"snr_gamma": 1.0})[0]
    assert "belong together" in Noising.check(good | {"timesteps": "grid"})[0]
    assert "belong together" in Noising.check(good | {"levels": (1.0,)})[0]
    assert "are used only with 'noising.timesteps' = logit_normal" in Noising.check(good | {"mean": 1.0})[0]
    assert "shift the levels" in Noising.check(good | {"timesteps": "grid", "levels": (1.0,), "shift": 2.0})[0]
    with pytest.raises(ValueError, match=r"holds \[1000.0\]; this model's timesteps lie in \[0, 999\]"):
        Noising(schedule_of(Prediction.V), Draws(0), timesteps="grid", levels=(1000.0,))
