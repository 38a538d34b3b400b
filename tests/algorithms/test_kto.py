"""Diffusion-KTO: utilities, the reference point, and the gradient direction for each image."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch

from diffalign.algorithms.kto import KTO, UTILITIES
from diffalign.data import Balanced
from diffalign.diffusion.schedule import Prediction
from diffalign.draws import Draws

GAINS = [1e-3, -5e-4, 2e-4, 0.0]
LIKED = [1.0, 0.0, 1.0, 0.0]


def kto_of(policy, reference, noising, mean=lambda x: x, **settings) -> KTO:
    return KTO(policy, reference, noising, 256, mean, **settings)


@pytest.mark.parametrize(
    ("utility", "expected"),
    [("kahneman_tversky", 0.5), ("loss_averse", 1 + math.log(2)), ("risk_seeking", 1 - math.log(2))],
)
def test_loss_at_step_zero(constant, noising_of, batch_of, utility: Any, expected: float) -> None:
    """z = 0: 1 - U(0)."""
    network = constant(0.2)
    loss, metrics = kto_of(network, network, noising_of(), utility=utility).loss(batch_of([1] * 4, LIKED))
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert metrics["reference_point"] == 0
    assert torch.equal(metrics["accuracy"], torch.full((4,), 0.5))


def test_beta_in_the_papers_convention(constant, noising_of, batch_of, monkeypatch) -> None:
    """beta 5000 without the factor 1/2 is 10000 here. Gains as given: KL = mean = 1.75e-4, loss 0.202999."""
    algorithm = kto_of(constant(0.0), constant(0.0), noising_of(), beta=10000.0)
    given = iter([torch.tensor(GAINS), torch.zeros(4)])
    monkeypatch.setattr(algorithm, "reference_errors", lambda batch, noised: next(given))
    monkeypatch.setattr("diffalign.algorithms.kto.errors", lambda network, noised: next(given))
    loss, metrics = algorithm.loss(batch_of([1] * 4, LIKED))
    assert metrics["reference_point"].item() == pytest.approx(5000 * 1.75e-4, rel=1e-5)
    assert loss.item() == pytest.approx(0.202999, abs=1e-6)


def test_the_reference_point_is_never_negative_and_has_no_gradient(constant, noising_of, batch_of) -> None:
    """The mean over all processes gets a detached tensor; a negative mean counts as zero."""
    seen = []

    def mean(value: torch.Tensor) -> torch.Tensor:
        seen.append(value)
        return value - 100

    algorithm = kto_of(constant(0.0), constant(0.3), noising_of(), mean, beta=1.0)
    assert algorithm.loss(batch_of([1] * 4, LIKED))[1]["reference_point"] == 0
    assert not seen[0].requires_grad


@pytest.mark.parametrize("utility", UTILITIES)
def test_gradient_lowers_errors_of_liked_images_and_raises_those_of_disliked_ones(
    constant, noising_of, batch_of, utility: Any
) -> None:
    """d loss / d err = + for liked, - for disliked; for Kahneman-Tversky beta/2 / 4 / B at step 0."""
    for liked, sign in ((1.0, 1), (0.0, -1)):
        policy, batch = constant(0.2), batch_of([1], [liked])
        algorithm = kto_of(policy, constant(0.2), noising_of(Prediction.V), utility=utility, beta=8.0)
        algorithm.loss(batch)[0].backward()
        noised = algorithm.noised(batch)
        slope = 2 * (0.2 - noised.target).mean().item()  # d err / d value
        expected = sign * slope * (8.0 / 2) * {"kahneman_tversky": 0.25}.get(utility, 0.5)
        assert policy.value.grad.item() == pytest.approx(expected, rel=1e-4)


def test_liked_and_disliked_images_have_separate_weights(constant, noising_of, batch_of) -> None:
    network = constant(0.2)
    algorithm = kto_of(network, network, noising_of(), weight_liked=3.0, weight_disliked=1.0)
    assert algorithm.loss(batch_of([1] * 4, LIKED))[0].item() == pytest.approx(0.5 * 2, abs=1e-6)
    cfg = {"beta": 1.0, "weight_liked": 1.0, "weight_disliked": 1.0}
    assert KTO.check(cfg) == []
    assert len(KTO.check(cfg | {"beta": 0.0, "weight_liked": -1.0})) == 2


class Image(NamedTuple):
    key: object
    index: int
    place: int = -1


class NineImages:
    """Nine images, three of them liked."""

    batch_size, num_workers, draws_per_sample = 4, 0, None
    ids = tuple(map(str, range(9)))
    liked, disliked = (0, 4, 8), (1, 2, 3, 5, 6, 7)

    def __len__(self):
        return 9

    def __getitem__(self, place):
        return ("plain", place)

    def draw(self, key, index):
        return Image(key, index)


def test_balanced_sampling_has_the_given_ratio_and_is_deterministic() -> None:
    balanced = Balanced(NineImages(), Draws(0), positive_ratio=0.8)  # type: ignore[arg-type]
    drawn = [balanced[epoch, slot] for epoch in range(200) for slot in range(9)]
    share = sum(index in NineImages.liked for _, index, _ in drawn) / len(drawn)  # type: ignore[misc]
    assert abs(share - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 1800)
    assert {index for _, index, _ in drawn} == set(range(9))  # type: ignore[misc]
    assert len({key for key, *_ in drawn}) == 1800  # type: ignore[misc]
    assert balanced[3, 5] == balanced[3, 5]
    assert Balanced(NineImages(), Draws(0), positive_ratio=None)[2, 3] == ("plain", (2, 3))  # type: ignore[arg-type]
    assert Balanced.check({"positive_ratio": None}) == []
    assert "between 0 and 1" in Balanced.check({"positive_ratio": 1.0})[0]
