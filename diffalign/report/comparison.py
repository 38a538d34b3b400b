"""How much better an aligned model is: how often people prefer its images, and by how many standard deviations.

The sign of a difference from equal noise says in which direction a model moved. Without noise even a nudge that nobody
can see wins nearly always, so that share is called `direction` here and is no headline. What people would say is
measured from independent noise: sample i of the base against every sample j, not i, of the aligned model, for the same
prompt. All intervals are 95 % bootstrap intervals over prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign.report.win_rate import TIE, paired_win_rate, sign_flip
from reward_models.accuracy import interval

VISIBLE = 0.2
"""A gain of fewer standard deviations than this, up or down, is too small to see (a small effect: Cohen, 1988)."""

HEADLINES = ("people_prefer", "share_won")
GAIN = ("gain_sd", "gain_sd_low", "gain_sd_high")


class Estimate(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        """{name, name_low, name_high}, as files hold it."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def preferred(
    base: ArrayLike, aligned: ArrayLike, prompt_ids: Sequence[Any], *, choice_temperature: float | None
) -> NDArray[np.float64]:
    """Scores [N], [N] of which equal places have equal noise -> how often the aligned image is preferred, [P] prompts.

    The mean over all ordered pairs i != j of samples of a prompt: of the choice probability sigmoid((aligned_j -
    base_i) / choice_temperature), or without a temperature of who scores higher, ties half.
    Raises ValueError for a prompt with one sample: it has no two images from independent noise.
    """
    one, other = np.asarray(base, dtype=np.float64), np.asarray(aligned, dtype=np.float64)
    found = []
    for where in _places(prompt_ids):
        if len(where) < 2:
            raise ValueError(one_sample(prompt_ids[where[0]]))
        difference = other[where][None, :] - one[where][:, None]
        if choice_temperature is None:
            chance = np.where(np.abs(difference) < TIE, 0.5, difference > 0)
        else:
            chance = 0.5 + np.tanh(difference / choice_temperature / 2) / 2  # the sigmoid, which cannot overflow
        found.append(chance[~np.eye(len(where), dtype=bool)].mean())
    return np.array(found)


def one_sample(prompt_id: Any) -> str:
    """What is wrong with a prompt that has one sample, and what to do."""
    return (
        f"prompt_id {prompt_id!r} has 1 sample, but images from independent noise are compared, so each prompt needs "
        "two or more: generate both folders with --samples-per-prompt 2"
    )


def compare(
    base: ArrayLike,
    aligned: ArrayLike,
    prompt_ids: Sequence[Any],
    *,
    name: str,
    choice_temperature: float | None,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Compare scores [N], [N] by one scorer of the same prompts and noise; the numbers of a `win_rate.json`.

    people_prefer or share_won   of `preferred`, prompts weighted equally; the latter for scorers without a temperature
    gain_sd                      mean difference of the scores, prompts weighted equally, in standard deviations of the
                                 base's scores over all its images. That deviation is the unit: the interval takes it as
                                 given. None when it is 0
    direction                    share of pairs from equal noise that score higher, ties half
    each with _low and _high, and
    measured_by                  the headline in words
    n, prompts, ties             pairs from independent noise; prompts; pairs from equal noise that score the same
    p_value                      two-sided, of "people do not prefer either"; flips the outcome of whole prompts
    base_sd, mean_base, mean_aligned, and mean_difference with _low and _high, in the scorer's unit

    Raises ValueError as `preferred` and `paired_win_rate` do.
    """
    direction = paired_win_rate(base, aligned, prompt_ids, seed=seed, resamples=resamples)
    share = preferred(base, aligned, prompt_ids, choice_temperature=choice_temperature)
    sd = float(np.std(np.asarray(base, dtype=np.float64)))
    low, high = interval(share, seed=seed, resamples=resamples)
    moved = (direction.mean_difference, direction.mean_difference_low, direction.mean_difference_high)
    key, how = "share_won", f"share of pairs in which {name} scores the aligned image higher, ties half"
    if choice_temperature is not None:
        key, how = "people_prefer", f"mean choice probability sigmoid(difference / {choice_temperature:g}) of {name}"
    _, sizes = np.unique(np.asarray(prompt_ids), return_counts=True)
    return {
        **Estimate(float(share.mean()), low, high).named(key),
        **(Estimate(*(x / sd for x in moved)).named("gain_sd") if sd else dict.fromkeys(GAIN)),
        **Estimate(direction.win_rate, direction.low, direction.high).named("direction"),
        "measured_by": f"{how}; sample i of the base against sample j, not i, of the aligned model",
        "n": int((sizes * (sizes - 1)).sum()),
        "prompts": direction.prompts,
        "ties": direction.ties,
        "p_value": sign_flip(share - 0.5, resamples, np.random.default_rng(seed)),
        "base_sd": sd,
        "mean_base": float(np.mean(np.asarray(base, dtype=np.float64))),
        "mean_aligned": float(np.mean(np.asarray(aligned, dtype=np.float64))),
        **Estimate(*moved).named("mean_difference"),
    }


def change(before: ArrayLike, after: ArrayLike, prompt_ids: Sequence[Any], *, seed: int = 0) -> Estimate:
    """The mean of after [N] minus before [N], prompts weighted equally."""
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    by_prompt = np.array([difference[where].mean() for where in _places(prompt_ids)])
    return Estimate(float(by_prompt.mean()), *interval(by_prompt, seed=seed))


def label_effect(
    base: ArrayLike, true: ArrayLike, random: ArrayLike, prompt_ids: Sequence[Any], *, seed: int = 0
) -> Estimate:
    """What the labels did: the gain with true labels minus the gain with random ones, in standard deviations of base.

    Scores [N] of the base, of the model trained on true labels and of the one trained on random labels, the rest equal.
    The gain with random labels is the training effect: what training does whatever the labels say. Both gains have the
    base in common, so the interval pairs them prompt by prompt.
    """
    sd = float(np.std(np.asarray(base, dtype=np.float64)))
    if not sd:
        raise ValueError("all images of the base score the same, so no effect can be measured; use another scorer")
    return Estimate(*(x / sd for x in change(random, true, prompt_ids, seed=seed)))


def headline(result: Mapping[str, Any]) -> tuple[str, Estimate]:
    """people_prefer or share_won, whichever a result of `compare` has, with its numbers."""
    key = next(key for key in HEADLINES if key in result)
    return key, Estimate(*(result[f"{key}{end}"] for end in ("", "_low", "_high")))


def verdict(result: Mapping[str, Any]) -> str:
    """too small to see (whatever else), better, worse, or unclear: the interval of the headline contains one half.

    Not measurable where all images of the base score the same.
    """
    _, (_, low, high) = headline(result)
    if result["gain_sd"] is None:
        return "not measurable"
    if abs(result["gain_sd"]) < VISIBLE:
        return "too small to see"
    return "better" if low > 0.5 else "worse" if high < 0.5 else "unclear"


def sentence(result: Mapping[str, Any]) -> str:
    """What was preferred and how surely, by a result of `compare` with its scorer's name."""
    key, numbers = headline(result)
    if result["gain_sd"] is None:
        return f"{result['name']} gives all images of the base the same score, so nothing can be measured by it."
    said = {
        "better": "The aligned model is preferred",
        "worse": "The base model is preferred",
        "unclear": "No clear preference",
        "too small to see": "A difference too small to see",
    }
    rate, low, high = (f"{100 * x:.1f} %" for x in numbers)
    gain, least, most = (signed(result[name], ".2f") for name in GAIN)
    name, people = result["name"], key == "people_prefer"
    who = "people choose the aligned image" if people else f"{name} scores the aligned image higher"
    by = f", by {name}" if people else ""
    return (
        f"{said[verdict(result)]}: {who} in {rate} of {result['n']} pairs from independent noise (95 % interval {low} "
        f"to {high}{by}); its gain is {gain} standard deviations ({least} to {most})."
    )


def signed(value: float, digits: str = ".3g") -> str:
    """With a sign, to so many digits as format takes them; 0 without."""
    shown = f"{value:+{digits}}"
    return shown.replace("-", "\N{MINUS SIGN}") if float(shown) else "0"


def _places(prompt_ids: Sequence[Any]) -> list[NDArray[np.intp]]:
    """Where the samples of each prompt are, in order."""
    _, cluster, sizes = np.unique(np.asarray(prompt_ids), return_inverse=True, return_counts=True)
    return np.split(np.argsort(cluster, kind="stable"), np.cumsum(sizes)[:-1])
