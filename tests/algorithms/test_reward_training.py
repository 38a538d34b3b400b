"""The ranking loss and the training algorithm of scorers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.algorithms.reward_training import RewardTraining
from diffalign.draws import Draws
from diffalign.objectives.preference import plackett_luce, ranking
from diffalign.types import GroupBatch


def _batch(ranks: Tensor, sizes: list[int], flip: float = 0.0) -> GroupBatch:
    n, g = sum(sizes), len(sizes)
    group = torch.arange(g).repeat_interleave(torch.tensor(sizes))
    keys = [(0, str(k)) for k in range(g)]
    return GroupBatch(torch.rand(n, 3, 2, 2), ["p"] * n, group, ranks, keys, torch.full((g,), flip))


class LogitTable(nn.Module):
    """A scorer whose logits are its parameter."""

    def __init__(self, logits: Tensor, dropout: float = 0.0):
        super().__init__()
        self.logits, self.drop = nn.Parameter(logits), nn.Dropout(dropout)

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return self.drop(self.logits)


def test_pairs_give_the_loss_of_hpsv2() -> None:
    """Logits (20, 21) with the second preferred and (22, 20.5) with the first: softplus(-1) + softplus(-1.5) =
    0.3132617 + 0.2014133 = 0.5146750, summed over the batch; the mean is half of it. Both pairs are right."""
    scorer = LogitTable(torch.tensor([20.0, 21.0, 22.0, 20.5]))
    batch = _batch(torch.tensor([[2.0], [1.0], [1.0], [2.0]]), [2, 2])
    loss, metrics = RewardTraining(scorer, Draws(0), reduction="sum").loss(batch)
    assert loss.item() == pytest.approx(0.5146749655, abs=1e-6)
    mean, _ = RewardTraining(scorer, Draws(0)).loss(batch)
    assert mean.item() == pytest.approx(0.5146749655 / 2, abs=1e-6)
    assert metrics["accuracy/overall"].tolist() == [1.0, 1.0]


def test_rankings_count_every_ordered_pair_once_and_no_tie() -> None:
    """Ranks 1, 2, 2, 4 make 5 pairs. Scores .3 .3 .1 .2 put (0,2), (0,3) right, tie on (0,1), are wrong on (2,3) and
    right on (1,3): 3 of 5. Loss: mean of softplus(-d) with d = 0, .2, .1, .1, -.1."""
    scores = torch.tensor([[0.3], [0.3], [0.1], [0.2]])
    ranks = torch.tensor([[1.0], [2.0], [2.0], [4.0]])
    loss, right, pairs = ranking(scores, ranks, torch.zeros(4, dtype=torch.long), torch.zeros(1))
    d = [0.0, 0.2, 0.1, 0.1, -0.1]
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-x)) for x in d) / 5, abs=1e-6)
    assert right.item() == pytest.approx(0.6) and pairs.item() == 5


def test_groups_are_never_compared_and_have_equal_weight() -> None:
    """A group of 4 and one of 2: the loss is averaged over pairs first, and equals the mean of each group alone."""
    torch.manual_seed(0)
    scores, ranks = torch.randn(6, 1), torch.tensor([[1.0], [2.0], [3.0], [4.0], [2.0], [1.0]])
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    both, _, _ = ranking(scores, ranks, group, torch.zeros(2))
    for k, mine in enumerate((slice(0, 4), slice(4, 6))):
        alone, _, _ = ranking(scores[mine], ranks[mine], torch.zeros_like(group[mine]), torch.zeros(1))
        assert torch.equal(alone[0], both[k])
    shifted, _, _ = ranking(scores + group[:, None] * 100, ranks, group, torch.zeros(2))
    torch.testing.assert_close(shifted, both, atol=1e-4, rtol=0)


def test_plackett_luce_by_hand() -> None:
    """Strengths 3, 2, 1 in this order: 3/6 times 2/3, loss (log 2 + log 1.5) / 2 stages. In the reverse order 1/6 times
    2/5. With the last two tied, only the first choice counts: log 2. A missing rank leaves 3 against 2: log 5/3."""
    scores, one = torch.tensor([3.0, 2.0, 1.0]).log()[:, None], torch.zeros(3, dtype=torch.long)

    def loss(ranks: list[float], flip: float = 0.0) -> float:
        return plackett_luce(scores, torch.tensor(ranks)[:, None], one, torch.tensor([flip]))[0].item()

    forwards, backwards = math.log(2 * 1.5) / 2, math.log(6 * 2.5) / 2
    assert loss([1, 2, 3]) == pytest.approx(forwards, abs=1e-6)
    assert loss([3, 2, 1]) == pytest.approx(backwards, abs=1e-6)
    assert loss([1, 2, 3], 0.25) == pytest.approx(0.75 * forwards + 0.25 * backwards, abs=1e-6)
    assert loss([1, 2, 2]) == pytest.approx(math.log(2), abs=1e-6)
    assert loss([1, 2, math.nan]) == pytest.approx(math.log(5 / 3), abs=1e-6)
    assert loss([2, 2, 2]) == 0


def test_lists_of_two_are_pairs_and_groups_are_not_compared() -> None:
    """Also with label noise and aspects; and the gradient raises the best image and lowers the worst."""
    torch.manual_seed(0)
    scores, ranks = torch.randn(4, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0], [2.0, 1.0], [1.0, 1.0]])
    group, flip = torch.tensor([0, 0, 1, 1]), torch.tensor([0.2, 0.0])
    for a, b in zip(plackett_luce(scores, ranks, group, flip), ranking(scores, ranks, group, flip), strict=True):
        torch.testing.assert_close(a, b)
    scorer = LogitTable(torch.zeros(7, 1))
    ranks = torch.tensor([[1.0], [2.0], [3.0], [4.0], [3.0], [2.0], [1.0]])
    loss, metrics = RewardTraining(scorer, Draws(0), loss="list").loss(_batch(ranks, [4, 3]))
    loss.backward()
    assert scorer.logits.grad[0] < 0 < scorer.logits.grad[3] and scorer.logits.grad[6] < 0 < scorer.logits.grad[4]
    assert scorer.logits.grad[:4].sum().abs() < 1e-6 and metrics["accuracy/overall"].tolist() == [0, 0]
    assert loss.item() == pytest.approx((math.log(24) / 3 + math.log(6) / 2) / 2, abs=1e-6)  # K! orders are equal


def test_swapping_labels_and_the_minimum_with_label_smoothing() -> None:
    """L(d) and L(-d) differ by d. With e = 1/4: -3/4 log sigmoid(d) - 1/4 log sigmoid(-d), minimal at d = log 3."""
    d = torch.tensor([[math.log(3.0)], [0.0]], requires_grad=True)
    group, up = torch.zeros(2, dtype=torch.long), torch.tensor([[1.0], [2.0]])
    right, wrong = (ranking(d, r, group, torch.zeros(1))[0] for r in (up, 3 - up))
    assert (wrong - right).item() == pytest.approx(math.log(3.0), abs=1e-6)
    soft = ranking(d, up, group, torch.full((1,), 0.25))[0]
    assert soft.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), abs=1e-6)
    (gradient,) = torch.autograd.grad(soft.sum(), d)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_aspects_have_their_own_ranking_and_may_be_missing() -> None:
    """Aspect 0 prefers the first image, aspect 1 the second, aspect 2 ties. The loss is the mean over aspects 0 and 1.

    Its gradient has opposite signs in their columns.
    """
    scorer = LogitTable(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    batch = _batch(torch.tensor([[1.0, 2.0, 1.0], [2.0, 1.0, 1.0]]), [2])
    loss, metrics = RewardTraining(scorer, Draws(0), ("a", "b", "c")).loss(batch)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2, abs=1e-6)
    assert metrics["accuracy/a"].item() == 1 and metrics["accuracy/b"].item() == 0
    assert metrics["accuracy/c"].isnan().all()
    loss.backward()
    assert (scorer.logits.grad[0].sign() == torch.tensor([-1.0, 1.0, 0.0])).all()


def test_reduction_and_label_smoothing() -> None:
    scorer = LogitTable(torch.tensor([1.0, 0.0, 1.0, 0.0]))
    ranks = torch.tensor([[1.0], [2.0], [1.0], [2.0]])
    one = math.log1p(math.exp(-1))
    loss, _ = RewardTraining(scorer, Draws(0), reduction="sum").loss(_batch(ranks, [2, 2]))
    assert loss.item() == pytest.approx(2 * one, abs=1e-6)
    smooth, _ = RewardTraining(scorer, Draws(0), label_smoothing=0.1).loss(_batch(ranks, [2, 2]))
    assert smooth.item() == pytest.approx(one + 0.1, abs=1e-6)  # e d with d = 1
    known, _ = RewardTraining(scorer, Draws(0), label_smoothing=0.1).loss(_batch(ranks, [2, 2], flip=0.2))
    assert known.item() == pytest.approx(one + 0.2, abs=1e-6)  # the record's own value takes precedence
    assert RewardTraining.check({"label_smoothing": 0.5}) and not RewardTraining.check({"label_smoothing": 0.4})


def test_dropout_is_drawn_by_key_and_leaves_the_global_generator_alone() -> None:
    scorer = LogitTable(torch.linspace(1, 2, 64), dropout=0.5)
    ranks = torch.tensor([[1.0], [2.0]]).repeat(32, 1)
    batch = _batch(ranks, [2] * 32)
    algorithm = RewardTraining(scorer, Draws(0), dropout=True)
    torch.manual_seed(5)
    first, before = algorithm.loss(batch)[0], torch.get_rng_state()
    again = algorithm.loss(batch)[0]
    other = algorithm.loss(batch._replace(keys=[(1, k) for _, k in batch.keys]))[0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    plain = RewardTraining(scorer, Draws(0)).loss(batch)[0]
    d = -(scorer.logits[1::2] - scorer.logits[::2]).detach()
    torch.testing.assert_close(plain, F.softplus(-d).mean())
