"""Losses on the implicit-reward margin: fixtures derived by hand, gradients by finite differences, identities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diffalign.diffusion.noising import denoising_error
from diffalign.objectives.preference import (
    PAIR_LOSSES,
    PairTerms,
    beta_in_other_units,
    check_pair_loss,
    describe_beta,
    gain,
    margin,
)

LN2 = math.log(2)
SMOOTHING = 0.1
AT_ZERO = {
    "dpo": LN2,
    "ln_dpo": LN2,
    "conservative": LN2,
    "robust": LN2,
    "aot": LN2,
    "offset": LN2,
    "dpo_sft": LN2,
    "clipped": LN2,
    "nca": 2 * LN2,
    "bco": 2 * LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "hinge": 1.0,
    "slic": 1.0,
    "ipo": 0.25,
    "sppo": 0.5,
    "discopop": 0.846574,
    "exo": -0.5 * math.log(4 * 0.9 * 0.1),
}


def rewards(r_w: list[float], r_l: list[float], flip: float = SMOOTHING, **more: Any) -> PairTerms:
    """Terms with these implicit rewards: beta = 2 and reference errors 0 make r = -err."""
    winner, loser = torch.tensor(r_w, dtype=torch.float64), torch.tensor(r_l, dtype=torch.float64)
    zero = torch.zeros_like(winner)
    return PairTerms(-winner, -loser, zero, zero, 2.0, torch.full_like(winner, flip), **more)


def margins(*m: float, flip: float = SMOOTHING) -> PairTerms:
    return rewards([x / 2 for x in m], [-x / 2 for x in m], flip)


def grad(x: torch.Tensor) -> torch.Tensor:
    assert x.grad is not None
    return x.grad


def random_terms(seed: int = 0, n: int = 6, beta: float = 50.0) -> PairTerms:
    g = torch.Generator().manual_seed(seed)
    errors = 0.1 + 0.05 * torch.rand(4, n, generator=g, dtype=torch.float64)
    return PairTerms(
        errors[0],
        errors[1],
        errors[2],
        errors[3],
        beta,
        0.3 * torch.rand(n, generator=g, dtype=torch.float64),
        sft_weight=0.1,
    )


def test_every_pair_loss_is_tested() -> None:
    assert set(AT_ZERO) == set(PAIR_LOSSES)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_policy_equal_to_reference(name: str) -> None:
    """Rewards 0: ln 2 for the sigmoid family, 2 ln 2 for NCA and BCO, 1 for APO and the hinges, 1/4 and 1/2 for the
    squares, (ln 2 + 1)/2 = 0.846574 for DiscoPOP, KL((1/2, 1/2) || (.9, .1)) = -1/2 ln(4 * .9 * .1) for EXO.
    """
    errors = torch.tensor([0.1003, 0.2, 0.05])  # float32, as in training
    slack = torch.zeros(3) if name == "slic" else torch.tensor([0.3, 0.0, -0.1])  # slic has no reference
    p = PairTerms(errors, errors + slack, errors, errors + slack, 5000.0, torch.full((3,), SMOOTHING), sft_weight=0.0)
    assert torch.equal(p.margin, torch.zeros(3))
    losses = PAIR_LOSSES[name](p)
    assert losses.shape == (3,)
    assert losses.tolist() == pytest.approx([AT_ZERO[name]] * 3, abs=1e-6)


@pytest.mark.parametrize(("beta", "m", "loss"), [(5000, 1.25, 0.251929), (2000, 0.5, 0.474077)])
def test_golden_margin_and_loss(beta: float, m: float, loss: float) -> None:
    """l_w .1000, l_l .1010, ref_w .1003, ref_l .1008: gains .0003 and -.0002, so m = beta/2 * .0005."""
    one = torch.ones(1, dtype=torch.float64)
    p = PairTerms(0.1 * one, 0.101 * one, 0.1003 * one, 0.1008 * one, beta, 0 * one)
    assert p.margin.item() == pytest.approx(m, abs=1e-9)
    assert margin(gain(p.ref_w, p.err_w), gain(p.ref_l, p.err_l), beta).item() == pytest.approx(m, abs=1e-9)
    assert (p.reward_w - p.reward_l).item() == pytest.approx(m, abs=1e-9)
    assert PAIR_LOSSES["dpo"](p).item() == pytest.approx(loss, abs=1e-6)


def test_beta_in_other_units() -> None:
    """5000 on SD1.5 (D = 16384): 2500 without the 1/2 in mean form, 0.1526 without it in sum form, 0.3052 with it.

    All give the same margin for the same errors.
    """
    units = beta_in_other_units(5000, 16384)
    mean_plain, sum_half, sum_plain = units.values()
    assert [mean_plain, sum_half, sum_plain] == pytest.approx([2500, 0.30518, 0.15259], abs=1e-5)
    mean_difference = 5e-4
    expected = 5000 / 2 * mean_difference
    assert mean_plain * mean_difference == pytest.approx(expected)
    assert sum_half / 2 * mean_difference * 16384 == pytest.approx(expected)
    assert sum_plain * mean_difference * 16384 == pytest.approx(expected)
    said = describe_beta(5000, 16384, "loss 'dpo'")
    assert said[0] == "beta 5000 (mean-form error, factor 1/2), loss 'dpo'; in other conventions:" and len(said) == 4
    assert said[1] == "  2500 mean form, no factor 1/2 (diffusers SD LoRA script, Diffusion-KTO)"


def test_swapping_winner_and_loser() -> None:
    """m -> -m, and log sigmoid(-m) = log sigmoid(m) - m gives L(-m) - L(m) = m."""
    p = random_terms()
    swapped = p._replace(err_w=p.err_l, err_l=p.err_w, ref_w=p.ref_l, ref_l=p.ref_w)
    assert torch.equal(swapped.margin, -p.margin)
    assert torch.allclose(PAIR_LOSSES["dpo"](swapped) - PAIR_LOSSES["dpo"](p), p.margin, atol=1e-12)


def test_gradient_of_dpo_is_the_formula() -> None:
    """dL/derr_w = beta/2 sigmoid(-m), dL/derr_l its negative."""
    p = random_terms()
    winner, loser = p.err_w.clone().requires_grad_(), p.err_l.clone().requires_grad_()
    p = p._replace(err_w=winner, err_l=loser)
    PAIR_LOSSES["dpo"](p).mean().backward()
    expected = p.beta / 2 * torch.sigmoid(-p.margin.detach()) / len(winner)
    assert torch.allclose(grad(winner), expected, rtol=1e-10)
    assert torch.allclose(grad(loser), -expected, rtol=1e-10)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_gradients_by_finite_differences(name: str) -> None:
    """Central differences, step 1e-6, in float64, for the mean loss of 6 pairs and each of their errors."""
    p, step = random_terms(), 1e-6

    def mean_loss(winner: torch.Tensor, loser: torch.Tensor) -> torch.Tensor:
        return PAIR_LOSSES[name](p._replace(err_w=winner, err_l=loser, clip=0.02)).mean()

    winner, loser = p.err_w.clone().requires_grad_(), p.err_l.clone().requires_grad_()
    mean_loss(winner, loser).backward()
    for i in range(len(winner)):
        nudge = torch.zeros_like(p.err_w)
        nudge[i] = step
        numeric_w = (mean_loss(p.err_w + nudge, p.err_l) - mean_loss(p.err_w - nudge, p.err_l)) / (2 * step)
        numeric_l = (mean_loss(p.err_w, p.err_l + nudge) - mean_loss(p.err_w, p.err_l - nudge)) / (2 * step)
        assert grad(winner)[i].item() == pytest.approx(numeric_w.item(), rel=1e-4, abs=1e-6)
        assert grad(loser)[i].item() == pytest.approx(numeric_l.item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", sorted({*PAIR_LOSSES} - {"apo_down", "slic", "aot", "discopop"}))
def test_every_loss_starts_by_lowering_the_winners_error(name: str) -> None:
    """At rewards 0. APO-down lowers winners' rewards by design; the other three are tested by themselves."""
    errors = torch.tensor([0.1, 0.2], dtype=torch.float64)
    winner, loser = errors.clone().requires_grad_(), errors.clone().requires_grad_()
    PAIR_LOSSES[name](PairTerms(winner, loser, errors, errors, 1000.0, torch.full_like(errors, 0.1))).mean().backward()
    assert grad(winner).min() > 0
    if name != "sppo":
        assert grad(loser).max() < 0


def test_a_shift_of_policy_and_reference_errors_changes_nothing() -> None:
    p = random_terms()
    shifted = p._replace(err_w=p.err_w + 0.5, ref_w=p.ref_w + 0.5)
    assert torch.allclose(shifted.margin, p.margin, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpo", [0.693147, 0.474077, 1.313262, 0.048587]),
        ("conservative", [0.693147, 0.524077, 1.213262, 0.348587]),
        ("robust", [0.693147, 0.411577, 1.438262, -0.326413]),
        ("ipo", [0.25, 0, 2.25, 6.25]),
        ("hinge", [1, 0.5, 2, 0]),
    ],
)
def test_golden_table(name: str, expected: list[float]) -> None:
    """e = 0.1, m = 0, .5, -1, 3. cDPO = DPO + e m; rDPO = DPO - e m / .8."""
    assert PAIR_LOSSES[name](margins(0, 0.5, -1, 3)).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # sp(x) = log(1 + e^x): sp(-1) .3132617, sp(1) 1.3132617, sp(2) 2.1269280, sp(-2) .1269280
        ("nca", 0.3132617 + 0.5 * 1.3132617 + 0.5 * 0.1269280),
        ("bco", 0.3132617 + 0.1269280),
        ("sppo", 0.5**2 + 1.5**2),
        ("apo_zero", (1 - 0.7310586) + 0.1192029),
        ("apo_down", 0.7310586 + (1 - 0.9525741)),
        # KL((s, 1-s) || (.9, .1)) with s = sigmoid(3) = .9525741
        ("exo", 0.9525741 * math.log(0.9525741 / 0.9) + 0.0474259 * math.log(0.0474259 / 0.1)),
        ("aot", 0.0485874 + 0.1 * 3),
        ("discopop", math.exp(-3)),
        ("offset", 0.1269280),
        # err_w = -r_w = -1 and beta = 2, so the winner's own term is .25 * -1
        ("dpo_sft", 0.0485874 - 0.25),
        # reference errors are 0, so the raw errors give 1 - (2 + 1) < 0: the hinge is closed
        ("slic", -0.25),
        # r/beta = .5 and -1 are beyond log 1.1 and log .9: beta (log 1.1 - log .9) = .4013414
        ("clipped", math.log1p(math.exp(-0.4013414))),
    ],
)
def test_golden_values_of_the_rest(name: str, expected: float) -> None:
    """r_w = 1, r_l = -2, m = 3, e = 0.1, offset 1, sft_weight .25, clip .1."""
    p = rewards([1.0, 1.0], [-2.0, -2.0], offset=1.0, sft_weight=0.25)
    assert PAIR_LOSSES[name](p).tolist() == pytest.approx([expected] * 2, abs=1e-6)


def test_without_smoothing_conservative_and_robust_are_dpo_bitwise() -> None:
    p = margins(-40, -1, 0, 0.3, 5, 200, flip=0.0)
    assert torch.equal(PAIR_LOSSES["conservative"](p), PAIR_LOSSES["dpo"](p))
    assert torch.equal(PAIR_LOSSES["robust"](p), PAIR_LOSSES["dpo"](p))


def test_robust_is_dpo_in_expectation_over_flips() -> None:
    """(1 - e) rDPO(m) + e rDPO(-m) = DPO(m)."""
    m = (-30, -1, 0, 0.5, 3, 30)
    here, there = PAIR_LOSSES["robust"](margins(*m)), PAIR_LOSSES["robust"](margins(*(-x for x in m)))
    expected = PAIR_LOSSES["dpo"](margins(*m))
    assert torch.allclose((1 - SMOOTHING) * here + SMOOTHING * there, expected, atol=1e-12)


def gradient_in_m(name: str, *m: float, flip: float = SMOOTHING) -> torch.Tensor:
    """dL/dm at r_w = m, r_l = 0; with beta = 2, r_w = -err_w."""
    p = rewards(list(m), [0.0] * len(m), flip)
    winner = p.err_w.clone().requires_grad_()
    PAIR_LOSSES[name](p._replace(err_w=winner)).sum().backward()
    return -grad(winner)


def test_conservative_has_its_minimum_at_the_logit() -> None:
    """log(.9 / .1) = 2.197225."""
    left, at, right = gradient_in_m("conservative", 2.1, 2.197225, 2.3).tolist()
    assert left < 0 < right
    assert at == pytest.approx(0, abs=1e-7)


def test_the_gradient_of_robust_never_vanishes() -> None:
    """dL/dm = -sigmoid(-m) - e/(1 - 2e) <= -.125 at e = .1."""
    gradients = gradient_in_m("robust", -1000, -1, 0, 5, 1000)
    assert gradients.max() <= -0.125
    assert gradients[-1].item() == pytest.approx(-0.125)


def test_gradients_of_ipo_and_hinge() -> None:
    """2 (m - 1/2), and -1 below 1, 0 above."""
    assert gradient_in_m("ipo", 0, 0.5, 2).tolist() == pytest.approx([-1, 0, 3])
    assert gradient_in_m("hinge", 0, 0.9, 1.1).tolist() == [-1, -1, 0]


def test_discopop_slope_at_zero_is_positive() -> None:
    """Slope at 0: g = 1/2, g' = 5, so 5 (1 - ln 2) - 1/4 - 1/2 = .784264: from step 0 it lowers the margin."""
    at, far = gradient_in_m("discopop", 0, 0.5).tolist()
    assert at == pytest.approx(5 * (1 - LN2) - 0.75)
    assert far < 0


def test_flip_is_per_pair() -> None:
    p = margins(1.0, 1.0)._replace(flip=torch.tensor([0.0, 0.3], dtype=torch.float64))
    clean, noisy = PAIR_LOSSES["conservative"](p).tolist()
    assert noisy - clean == pytest.approx(0.3)


def test_clipped_rewards_get_no_gradient() -> None:
    """r_w / beta = .05 lies inside log(1 +- .1), r_l / beta = -.5 outside."""
    p = rewards([0.1], [-1.0])
    winner, loser = p.err_w.clone().requires_grad_(), p.err_l.clone().requires_grad_()
    PAIR_LOSSES["clipped"](p._replace(err_w=winner, err_l=loser)).sum().backward()
    assert grad(winner).item() > 0
    assert grad(loser).item() == 0


def test_slic_uses_raw_errors_only() -> None:
    """1 - beta/2 (.3 - .1) with beta 4 is .6, plus .5 * 2 * .1 = .1; the reference does not enter."""
    one = torch.ones(1)
    terms = PairTerms(0.1 * one, 0.3 * one, 7 * one, 9 * one, 4.0, 0 * one, sft_weight=0.5)
    assert PAIR_LOSSES["slic"](terms).item() == pytest.approx(0.7)


def test_aot_compares_sorted_rewards() -> None:
    """Winners (3, 1), losers (0, 2): sorted differences 1 - 0 and 3 - 2, both 1, whatever the pairing."""
    losses = PAIR_LOSSES["aot"](rewards([3.0, 1.0], [0.0, 2.0], flip=0.0))
    assert losses.tolist() == pytest.approx([0.3132617] * 2, abs=1e-6)
    mixed = rewards([3.0, 1.0], [0.0, 2.0])._replace(flip=torch.tensor([0.0, 0.2], dtype=torch.float64))
    assert PAIR_LOSSES["aot"](mixed).tolist() == pytest.approx([0.4132617] * 2, abs=1e-6)


def test_the_sft_term_keeps_its_gradient_share_when_beta_changes() -> None:
    """At step 0 the gradient in err_w is beta/4 (pair term) and sft_weight beta/2 (SFT term): ratio 2 sft_weight."""
    for beta in (500.0, 5000.0):
        e = torch.full((1,), 0.1, dtype=torch.float64)
        winner = e.clone().requires_grad_()
        PAIR_LOSSES["dpo_sft"](PairTerms(winner, e, e, e, beta, 0 * e, sft_weight=0.25)).sum().backward()
        assert grad(winner).item() == pytest.approx(beta / 4 * 1.5)


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_for_margins_of_ten_thousand(name: str, dtype: torch.dtype) -> None:
    p = rewards([1e4, -1e4, 0.0, 0.0, 5e3, -5e3], [0.0, 0.0, 1e4, -1e4, -5e3, 5e3])
    winner, loser = p.err_w.to(dtype).requires_grad_(), p.err_l.to(dtype).requires_grad_()
    p = PairTerms(winner, loser, p.ref_w.to(dtype), p.ref_l.to(dtype), p.beta, p.flip.to(dtype))
    losses = PAIR_LOSSES[name](p)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert grad(winner).isfinite().all()
    assert grad(loser).isfinite().all()


def test_large_margins_keep_the_linear_tail() -> None:
    """-log sigmoid(-1e4) = 1e4 and its gradient stays -1."""
    assert PAIR_LOSSES["dpo"](margins(-1e4)).item() == pytest.approx(1e4)
    assert gradient_in_m("dpo", -1e4).item() == pytest.approx(-1)


def test_denoising_error_is_a_float32_mean_per_sample() -> None:
    """Differences of 1 and 3 everywhere: errors 1 and 9, whatever the size and the input precision."""
    out = torch.stack([torch.ones(4, 5, 6), 3 * torch.ones(4, 5, 6)]).to(torch.float16)
    error = denoising_error(out, torch.zeros(2, 4, 5, 6, dtype=torch.bfloat16))
    assert error.dtype == torch.float32
    assert error.tolist() == [1, 9]
    # A float16 error would be off by up to 6e-5 here.
    fine = denoising_error(torch.full((1, 4, 8, 8), 0.37, dtype=torch.float16), torch.zeros(1, 4, 8, 8))
    assert fine.item() == pytest.approx(float(torch.tensor(0.37, dtype=torch.float16)) ** 2, rel=1e-6)


def test_valid_settings_pass() -> None:
    for name in PAIR_LOSSES:
        uses = name in ("conservative", "robust", "exo", "aot")
        assert check_pair_loss(name, 0.1 if uses else 0.0, 2) == []


@pytest.mark.parametrize(
    ("loss", "smoothing", "batch", "message"),
    [
        ("dop", 0.0, 2, "'algorithm.loss' = dop is not a pair loss; did you mean 'dpo'?"),
        ("zzzz", 0.0, 2, "known: dpo, "),
        ("robust", 0.5, 2, "'algorithm.label_smoothing' = 0.5 must lie in [0, 0.5)"),
        ("robust", -0.1, 2, "must lie in [0, 0.5)"),
        ("exo", 0.0, 2, "exo needs 'algorithm.label_smoothing' > 0"),
        ("aot", 0.0, 1, "aot sorts within a batch and needs 2 pairs or more; got 1"),
        ("dpo", 0.1, 2, "has no effect on loss 'dpo'; it is used by conservative, robust"),
    ],
)
def test_invalid_settings_are_reported(loss: str, smoothing: float, batch: int, message: str) -> None:
    (problem,) = check_pair_loss(loss, smoothing, batch)
    assert message in problem
    assert "\n" not in problem
