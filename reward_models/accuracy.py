"""Accuracy of scorers against human preferences, by every published definition.

A definition says of one prompt with n images how much is right out of how much is counted, from scores [n] (larger is
better) and ranks [n] (lower is better). The accuracy of a data set is the sum of the former over that of the latter,
so where (share, 1) is returned every prompt counts the same, and where pairs are counted every pair does.

The definitions differ in what ties count for, by up to several points: a number without its definition says little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHUNK = 2_000_000
"""Numbers drawn at once; bounds the memory, and is part of what makes a seed reproducible."""

QUANTILES = (0.025, 0.975)
"""Of resampled means: the ends of a 95 % interval."""

THRESHOLDS = tuple(t / 10 for t in range(11))
"""Between which `best_threshold` chooses."""

Credit = tuple[float, float]
"""Correct and counted amounts of one prompt. (0, 0): the prompt is left out."""

Metric = Callable[[ArrayLike, ArrayLike], Credit]


class Group(NamedTuple):
    """The images of one prompt: scores [n], larger is better; ranks [n], lower is better."""

    prompt: str
    scores: Sequence[float]
    ranks: Sequence[float]


@dataclass(frozen=True)
class Accuracy:
    """An accuracy with what it was counted from.

    value, low, high         with the 95 % interval of a bootstrap over prompts
    prompts                  that were counted
    pairs, ties, score_ties  all pairs of images of one prompt; those that people find equal; those scored equal
    """

    metric: str
    value: float
    low: float
    high: float
    prompts: int
    pairs: int
    ties: int
    score_ties: int


def accuracy(
    name: str, groups: Sequence[Group], metric: Metric | None = None, *, seed: int = 0, resamples: int = 2000
) -> Accuracy:
    """The accuracy of a data set by METRICS[name], or by the metric given under that name.

    Raises ValueError for unknown names, scores that are not finite, and fewer than two prompts with anything to count.
    """
    if metric is None and name not in METRICS:
        raise ValueError(f"no metric '{name}'; known: {', '.join(METRICS)}")
    measure = metric or METRICS[name]
    credits = np.array([measure(g.scores, g.ranks) for g in groups], dtype=np.float64).reshape(-1, 2)
    _, cluster = np.unique([g.prompt for g in groups], return_inverse=True)
    by_prompt = np.stack([np.bincount(cluster, column) for column in credits.T], axis=1)
    counted = by_prompt[by_prompt[:, 1] > 0]
    low, high = interval(*counted.T, seed=seed, resamples=resamples)
    right, total = counted.sum(0)
    human, scored = (np.concatenate(x) for x in zip(*(_signs(g.scores, g.ranks) for g in groups), strict=True))
    ties, score_ties = int(np.sum(human == 0)), int(np.sum(scored == 0))
    return Accuracy(name, float(right / total), low, high, len(counted), len(human), ties, score_ties)


def interval(
    values: ArrayLike, counts: ArrayLike | None = None, *, seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of values [P]; with counts [P] > 0, of sum(values) / sum(counts).

    Resample what is independent: prompts, since pairs of one prompt share images; or people. Deterministic by seed.
    Raises ValueError for fewer than two values.
    """
    first = np.asarray(values, dtype=np.float64)
    if len(first) < 2:
        raise ValueError(f"an interval needs at least 2 prompts with counted pairs; got {len(first)}")
    rows = np.stack([first, np.ones(len(first)) if counts is None else np.asarray(counts)], axis=1)
    means = bootstrap(rows, np.random.default_rng(seed), resamples)
    low, high = np.quantile(means[:, 0] / means[:, 1], QUANTILES)
    return float(low), float(high)


def bootstrap(rows: NDArray[np.float64], rng: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    """Column means of rows [P, K], drawn anew with replacement so many times (Efron & Tibshirani, 1993, chapter 13):
    [resamples, K]. Percentile intervals are their QUANTILES."""
    chosen = (rng.integers(len(rows), size=(n, len(rows))) for n in chunks(resamples, len(rows)))
    return np.concatenate([rows[c].mean(1) for c in chosen])


def chunks(resamples: int, rows: int) -> list[int]:
    """How many resamples of so many rows to draw at once: numbers that add up to `resamples`."""
    size = max(1, CHUNK // rows)
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def _signs(scores: ArrayLike, ranks: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of every pair i < j: human order, 1 where i is better, 0 for a tie, -1; and the difference of the scores."""
    s, r = np.asarray(scores, dtype=np.float64), np.asarray(ranks, dtype=np.float64)
    if s.ndim != 1 or s.shape != r.shape or len(s) < 2:
        raise ValueError(
            f"scores and ranks must be one number for each of two or more images; got {s.shape}, {r.shape}"
        )
    if not np.isfinite(s).all() or not np.isfinite(r).all():
        raise ValueError(f"scores and ranks must be finite; got {s.tolist()} and {r.tolist()}")
    i, j = np.triu_indices(len(s), 1)
    return np.sign(r[j] - r[i]), s[i] - s[j]


def hps_inversion(scores: ArrayLike, ranks: ArrayLike) -> Credit:
    """M1, HPDv2: share of pairs that the two orders do not invert. Ties of labels are right; equal scores are put in
    the order in which the images come."""
    h, _ = _signs(scores, ranks)
    places = np.argsort(np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable"))
    _, d = _signs(-places, ranks)
    return float(np.mean(h * d >= 0)), 1.0


def mps_inversion(scores: ArrayLike, ranks: ArrayLike) -> Credit:
    """M1', MPS: as hps_inversion on the scores themselves, so that equal scores are right too."""
    h, d = _signs(scores, ranks)
    return float(np.mean(h * d >= 0)), 1.0


def ir_macro(scores: ArrayLike, ranks: ArrayLike) -> Credit:
    """M2, the ImageReward column of HPSv2: share of the pairs without label ties; equal scores are wrong. A prompt
    whose labels all tie is left out, where the published code divides by zero."""
    right, counted = ir_micro(scores, ranks)
    return (right / counted, 1.0) if counted else (0.0, 0.0)


def ir_micro(scores: ArrayLike, ranks: ArrayLike) -> Credit:
    """M3, ImageReward: as ir_macro, every pair counting the same."""
    h, d = _signs(scores, ranks)
    return float(np.sum(h * d > 0)), float(np.sum(h != 0))


def pick_threshold(scores: ArrayLike, ranks: ArrayLike, threshold: float) -> Credit:
    """M4, PickScore: the scorer too may say "tie", where its two probabilities differ by no more than the threshold.

    1 for the same answer, 1/2 where exactly one of the two is a tie. Scores must be logits: the probability of i over j
    is sigmoid(s_i - s_j). "Always a tie" is worth `always_tie`; print it beside this number.
    """
    h, d = _signs(scores, ranks)
    predicted = np.where(np.tanh(np.abs(d) / 2) <= threshold, 0, np.sign(d))  # |sigmoid(d) - sigmoid(-d)|
    return float(np.sum(1 - np.minimum(np.abs(predicted - h), 2) / 2)), float(len(h))


def best_threshold(groups: Sequence[Group]) -> float:
    """The threshold of THRESHOLDS with the largest pick_threshold, the smallest among equals. Choose it on other data
    than it is applied to."""
    credits = [[pick_threshold(g.scores, g.ranks, t)[0] for g in groups] for t in THRESHOLDS]
    return THRESHOLDS[int(np.argmax(np.sum(credits, axis=1)))]


def always_tie(groups: Sequence[Group]) -> float:
    """The pick_threshold accuracy of predicting a tie for every pair: f + (1 - f) / 2, f the share of label ties."""
    signs = np.concatenate([_signs(g.scores, g.ranks)[0] for g in groups])
    return float(np.mean(signs == 0) / 2 + 0.5)


def pick_trainer(scores: ArrayLike, ranks: ArrayLike) -> Credit:
    """M5, PickScore's training log: label ties are worth 1/2, equal scores nothing, whatever the label."""
    h, d = _signs(scores, ranks)
    return float(np.sum((d != 0) * (1 + h * np.sign(d)) / 2)), float(len(h))


def strict(scores: ArrayLike, ranks: ArrayLike) -> Credit:
    """M6, HPSv3: label ties are left out, equal scores are wrong. Its data are pairs; there it is ir_micro."""
    return ir_micro(scores, ranks)


def ge(scores: ArrayLike, ranks: ArrayLike) -> Credit:
    """M7, Social Reward: the better image must score no lower, so equal scores are right. Label ties are left out."""
    h, d = _signs(scores, ranks)
    return float(np.sum((h != 0) & (h * d >= 0))), float(np.sum(h != 0))


def argmax(scores: ArrayLike, ranks: ArrayLike) -> Credit:
    """M8, HPS v1: whether the image that scores highest is one that people put first; the first of equal scores.
    A prompt whose labels all tie is left out."""
    h, _ = _signs(scores, ranks)
    if not h.any():
        return 0.0, 0.0
    r = np.asarray(ranks, dtype=np.float64)
    return float(r[np.argmax(scores)] == r.min()), 1.0


def kendall_tau_b(scores: ArrayLike, ranks: ArrayLike) -> Credit:
    """Kendall's tau-b of scores and human order, in [-1, 1], every prompt counting the same. Equal scores throughout
    are worth 0; a prompt whose labels all tie is left out."""
    from scipy.stats import kendalltau  # the import takes a second, and nothing else needs it

    h, d = _signs(scores, ranks)
    if not h.any():
        return 0.0, 0.0
    return (float(kendalltau(scores, -np.asarray(ranks)).statistic) if d.any() else 0.0), 1.0


METRICS: Mapping[str, Metric] = {
    m.__name__: m
    for m in (hps_inversion, mps_inversion, ir_macro, ir_micro, pick_trainer, strict, ge, argmax, kendall_tau_b)
}
"""By name. `pick_threshold` is not among them: it needs a threshold, chosen on other data."""


def win_rates(scores: ArrayLike) -> NDArray[np.float64]:
    """Scores [R, K] of K images of one prompt by R scorers -> phi, float64 [K] in [0, 1], larger is better.

    phi_i = C_i / (R (K - 1)), where C_i counts, over all scorers and all other images, how often image i scores
    strictly higher (Syn-Pic: Karthik et al., 2024, arXiv 2410.18013, Algorithm 1). A tie is counted for neither image,
    so the sum over the images is K / 2 without ties and smaller with them. Any monotone change of a scorer's scale
    changes nothing. Raises ValueError for other shapes, fewer than two images, and scores that are not finite.
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] < 2:
        raise ValueError(f"win rates need scores [R, K] with R >= 1 scorers and K >= 2 images; got {[*table.shape]}")
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0].tolist()
        raise ValueError(f"scores[{row}, {column}] is not finite; score that image again")
    wins = (table[:, :, None] > table[:, None, :]).sum((0, 2))
    return wins / (table.shape[0] * (table.shape[1] - 1))
