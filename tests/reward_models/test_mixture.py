"""Weighted sums of scorers: weights, normalisation, gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from reward_models import Scorer, WeightedSum


class Mean(nn.Module):
    """The mean of an image times a factor."""

    differentiable, unit = True, "raw"

    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor), requires_grad=False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.factor * images.mean((1, 2, 3))


class Length:
    """The length of the prompt."""

    differentiable, unit = False, "letters"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(len(prompt)) for prompt in prompts])


def _grey(*levels: float) -> Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


def test_weights_without_normalisation() -> None:
    """2 * 0.5 - 0.25 * 3 = 0.25; 2 * 1 - 0.25 * 1 = 1.75."""
    mixture = WeightedSum({"hps_v2.1": (Mean(), 2.0), "length": (Length(), -0.25)})
    scores = mixture.score(_grey(0.5, 1.0), ["abc", "a"])
    torch.testing.assert_close(scores, torch.tensor([0.25, 1.75]))
    assert scores.dtype == torch.float32 and isinstance(mixture, Scorer)
    assert mixture.unit == "2*hps_v2.1 (raw) + -0.25*length (letters)"


def test_fixed_normalisation() -> None:
    """(0.5 - 0.25) / 0.5 = 0.5, three times; (3 - 1) / 4 = 0.5: 1.5 + 0.5."""
    scorers: dict[str, tuple[Scorer, float]] = {"mean": (Mean(), 3.0), "length": (Length(), 1.0)}
    mixture = WeightedSum(scorers, normalise="fixed", statistics={"mean": (0.25, 0.5), "length": (1.0, 4.0)})
    torch.testing.assert_close(mixture.score(_grey(0.5), ["abc"]), torch.tensor([2.0]))
    assert mixture.unit.endswith("each normalised (fixed)")


def test_running_normalisation() -> None:
    """0, 0.5, 1 and 0.5 have mean 0.5 and variance 0.125, for any batch sizes; 1 is then 1.41421."""
    values = [0.0, 0.5, 1.0, 0.5]
    for cut in (1, 2, 3):
        mixture = WeightedSum({"mean": (Mean(), 1.0)}, normalise="running")
        for part in (values[:cut], values[cut:]):
            mixture.update(mixture.parts(_grey(*part), ["x"] * len(part)))
        torch.testing.assert_close(mixture.score(_grey(1.0), ["x"]), torch.tensor([2**0.5]), atol=1e-6, rtol=0)
        assert mixture.count == 4
    before = mixture.mean.clone()
    mixture.train().score(_grey(0.1, 0.2), ["x", "y"])
    assert torch.equal(mixture.mean, before)  # only `update` changes the statistics


def test_running_statistics_survive_a_checkpoint() -> None:
    mixture, other = (WeightedSum({"mean": (Mean(), 1.0)}, normalise="running") for _ in range(2))
    mixture.update(mixture.parts(_grey(0.1, 0.9, 0.3), ["x"] * 3))
    other.load_state_dict(mixture.state_dict())
    assert torch.equal(other.score(_grey(0.4), ["x"]), mixture.score(_grey(0.4), ["x"]))


def test_gradients_pass_through_the_normalisation_but_not_into_the_statistics() -> None:
    """d/dx of weight * mean(x) / std: each of 48 values gets 2 / 48 / std."""
    mixture = WeightedSum({"mean": (Mean(), 2.0)}, normalise="running")
    x = _grey(0.2, 0.6).requires_grad_()
    parts = mixture.parts(x, ["a", "b"])
    mixture.update(parts)
    assert not mixture.mean.requires_grad and not mixture.squares.requires_grad
    (gradient,) = torch.autograd.grad(mixture.combine(parts).sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 2 / 48 / 0.2), atol=1e-5, rtol=0)
    assert mixture.differentiable
    assert not WeightedSum({"mean": (Mean(), 1.0), "length": (Length(), 1.0)}).differentiable


def test_networks_are_submodules_of_the_mixture() -> None:
    mixture = WeightedSum({"a.b": (Mean(), 1.0), "length": (Length(), 1.0)})
    assert [p.shape for p in mixture.parameters()] == [torch.Size([])]


def test_inconsistent_mixture_settings_are_refused() -> None:
    scorers: dict[str, tuple[Scorer, float]] = {"mean": (Mean(), 1.0)}
    with pytest.raises(ValueError, match="needs at least one scorer"):
        WeightedSum({})
    with pytest.raises(ValueError, match="statistics are required with normalise='fixed'"):
        WeightedSum(scorers, normalise="fixed")
    with pytest.raises(ValueError, match="allowed only with it; got normalise='none'"):
        WeightedSum(scorers, statistics={"mean": (0, 1)})
    with pytest.raises(ValueError, match="expected statistics of mean; got maen"):
        WeightedSum(scorers, normalise="fixed", statistics={"maen": (0, 1)})
    with pytest.raises(ValueError, match="deviation of 'mean' must be above 0"):
        WeightedSum(scorers, normalise="fixed", statistics={"mean": (0, 0)})
    mixture = WeightedSum(scorers, normalise="running")
    with pytest.raises(ValueError, match="the 0 scores of 'mean' so far do not differ"):
        mixture.score(_grey(0.5), ["x"])
    with pytest.raises(ValueError, match="nan or infinite"):
        mixture.update({"mean": torch.tensor([float("nan")])})
    with pytest.raises(ValueError, match="`update` needs normalise='running' or 'start'; got 'none'"):
        WeightedSum(scorers).update({"mean": torch.zeros(1)})
    with pytest.raises(ValueError, match="images must be float"):
        WeightedSum(scorers).score(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ["x"])


def _two(**settings) -> WeightedSum:
    return WeightedSum({"a": (Mean(), 1.0), "b": (Mean(), 1.0)}, normalise="start", **settings)


def test_start_statistics_do_not_change_later() -> None:
    """The first 256 scores fix the statistics: (3 - 0.5) / 0.5 = 5 with mean 0.5 and std 0.5."""
    mixture = _two()
    first = torch.tensor([0.0, 1.0] * 128)
    mixture.update({"a": first, "b": first})
    mixture.update({"a": first + 100, "b": first + 100})
    assert mixture.combine({"a": torch.tensor([3.0]), "b": torch.tensor([0.5])}).item() == pytest.approx(5)


def test_maxmin_moves_the_weights_to_the_scorer_with_the_smallest_gain() -> None:
    """One step by hand: gains +1 and -1, average 0.1 of them, shares exp(-5 * 0.1) and exp(5 * 0.1), sum 2."""
    mixture = _two(maxmin=5)
    first = torch.tensor([0.0, 2.0] * 128)  # mean 1, deviation 1
    mixture.update({"a": first, "b": first})
    assert mixture.present_weights() == {"a": 1.0, "b": 1.0}
    mixture.update({"a": torch.full((4,), 2.0), "b": torch.zeros(4)})
    low, high = torch.exp(torch.tensor([-0.5, 0.5], dtype=torch.float64)).tolist()
    weights = mixture.present_weights()
    assert weights["a"] == pytest.approx(2 * low / (low + high)) and weights["b"] == pytest.approx(
        2 * high / (low + high)
    )


def test_maxmin_equalises_the_gains_of_conflicting_groups() -> None:
    """Three groups, five actions, the policy in closed form: p ~ exp(sum w_g r_g / beta). With the final weights of
    MaxMin, no group has a smaller gain than the smallest under equal weights, and all gains are equal."""
    rewards = torch.tensor([[1.0, 0.2, 0.0, 0.6, 0.1], [0.0, 0.9, 0.1, 0.5, 0.2], [0.1, 0.0, 1.0, 0.4, 0.3]])
    names = ("a", "b", "c")
    mixture = WeightedSum({n: (Mean(), 1.0) for n in names}, normalise="start", maxmin=5)
    everything = {n: rewards[k].repeat(52) for k, n in enumerate(names)}
    mixture.update(everything)  # the reference: a uniform policy, 260 scores
    units = torch.stack(list(mixture.normalised({n: rewards[k] for k, n in enumerate(names)}).values()))

    def gains(weights: Sequence[float]) -> Tensor:
        policy = torch.softmax(torch.tensor(weights) @ units / 0.6, dim=0)
        return units @ policy

    equal = gains([1.0, 1.0, 1.0])
    for _ in range(2000):
        now = gains(list(mixture.present_weights().values()))
        scores = [now[k] * rewards[k].std(correction=0) + rewards[k].mean() for k in range(3)]
        mixture.update({n: scores[k].repeat(2) for k, n in enumerate(names)})
    ended = gains(list(mixture.present_weights().values()))
    assert ended.min() > equal.min()
    assert ended.max() - ended.min() < 0.05 < equal.max() - equal.min()


def test_maxmin_requires_start_normalisation() -> None:
    with pytest.raises(ValueError, match="maxmin compares gains"):
        WeightedSum({"a": (Mean(), 1.0)}, normalise="running", maxmin=0.5)
