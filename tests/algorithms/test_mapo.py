"""MaPO: the link function, both published settings, and no reference."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.algorithms.mapo import MaPO, link
from diffalign.diffusion.schedule import Prediction


def test_link_by_hand() -> None:
    """f(0) = 1, f'(0) = -scale/2; scale 1, power 2 at error 1: (1 / (e - 1))^2 = 0.338697. f decreases."""
    error = torch.tensor([0.0, 1e-8, 1.0], dtype=torch.float64)
    assert link(error, 1.0, 2.0).tolist() == pytest.approx([1, 1, (1 / (math.e - 1)) ** 2], abs=1e-6)
    x = torch.tensor(1e-3, dtype=torch.float64, requires_grad=True)
    link(x, 0.5, 1.0).backward()
    assert x.grad.item() == pytest.approx(-0.25, abs=1e-4)
    falling = link(torch.linspace(0, 5, 100), 0.5, 1.0).diff()
    assert (falling < 0).all()


def test_equal_errors_leave_the_winners_error_and_ln_2(constant, noising_of, batch_of) -> None:
    """eps is shared and a constant network has equal errors on both: margin 0, loss = err + 0.1 ln 2 (code),
    err + ln 2 / beta (paper, beta 128).
    """
    for settings, weight in (({}, 0.1), ({"scale": 1.0, "power": 128.0, "sharpness": 1.0, "weight": 1 / 128}, 1 / 128)):
        algorithm, batch = MaPO(constant(0.2), noising_of(), **settings), batch_of([2] * 3)
        loss, metrics = algorithm.loss(batch)
        assert loss.item() == pytest.approx(metrics["winner_error"].mean().item() + weight * math.log(2), abs=1e-6)
        assert torch.allclose(metrics["winner_error"], metrics["loser_error"])


def test_the_margin_term_lowers_winner_errors_and_raises_loser_errors(constant, noising_of, batch_of) -> None:
    """d margin term / d err_w > 0 and / d err_l < 0, so its gradient has the sign of the slope of err_w - err_l, which
    the ORPO script of diffusers has with the opposite sign.
    """
    policy, batch = constant(0.2), batch_of([2])
    algorithm = MaPO(policy, noising_of(Prediction.V), sharpness=1.0, weight=1000.0)
    algorithm.loss(batch)[0].backward()
    target_w, target_l = algorithm.noised(batch).target.mean((1, 2, 3))
    slope = 2 * (target_l - target_w)  # d (err_w - err_l) / d value
    assert math.copysign(1, policy.value.grad) == math.copysign(1, slope)


def test_no_reference_is_run(constant, noising_of, batch_of) -> None:
    forwards = []
    policy = constant(0.2)
    policy.register_forward_hook(lambda *_: forwards.append(1))
    algorithm = MaPO(policy, noising_of())
    algorithm.loss(batch_of([2] * 3))
    assert forwards == [1] and algorithm.reference is None
    assert "must be positive" in MaPO.check({"scale": 0.0, "power": 1.0}, {"draws_per_sample": None})[0]
