"""Syn-Pic's win rates: the fixtures of the specification (4.1, 4.5e), ties, scales, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from reward_models.accuracy import win_rates


def test_win_rate_is_one_for_the_unanimous_best_and_zero_for_the_worst() -> None:
    """Two scorers, three images. Wins: image 0 beats both others twice (4), image 1 beats image 2 once, image 2 beats
    image 1 once; C = (4, 1, 1) of 2 * 2 = 4 comparisons each."""
    scores = np.array([[9.0, 2.0, 1.0], [0.3, 0.1, 0.2]])
    assert win_rates(scores).tolist() == [1.0, 0.25, 0.25]
    assert win_rates(np.array([[4.0, 3, 2, 1], [40, 30, 20, 10]])).tolist() == [1, 2 / 3, 1 / 3, 0]


def test_win_rates_without_ties_sum_to_half_the_images() -> None:
    scores = np.random.default_rng(0).standard_normal((5, 4))
    phi = win_rates(scores)
    assert phi.sum().item() == pytest.approx(4 / 2, abs=1e-12)
    assert phi.dtype == np.float64 and 0 <= phi.min() <= phi.max() <= 1


def test_a_tie_is_a_win_for_neither() -> None:
    """C = (1, 1, 0) of 2 comparisons: the tie counts for neither, and both beat the third. The sum is below 3/2."""
    assert win_rates(np.array([[2.0, 2.0, 1.0]])).tolist() == [0.5, 0.5, 0.0]


def test_win_rates_are_invariant_to_units_and_image_order() -> None:
    scores = np.random.default_rng(1).standard_normal((3, 5))
    rescaled = np.stack([np.exp(scores[0]), scores[1] * 1000 - 7, scores[2]])
    order = np.array([4, 2, 0, 3, 1])
    assert np.array_equal(win_rates(scores), win_rates(rescaled))
    assert np.array_equal(win_rates(scores)[order], win_rates(scores[:, order]))
    assert not np.array_equal(win_rates(scores), win_rates(-scores))


@pytest.mark.parametrize("shape", [(3,), (2, 1), (0, 3), (2, 2, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"scores \[R, K\]"):
        win_rates(np.zeros(shape))


def test_scores_that_are_not_finite_are_named() -> None:
    with pytest.raises(ValueError, match=r"scores\[1, 0\] is not finite"):
        win_rates(np.array([[1.0, 2.0], [float("nan"), 2.0]]))
