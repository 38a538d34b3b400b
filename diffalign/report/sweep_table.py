"""The table of a sweep: a verdict on every point, and one sentence of advice.

The verdict on a point is the first that applies. Drift is the relative change of the preferred images' denoising error,
policy against reference, over the last tenth of the steps, where the algorithm logs it. Gain is the mean difference of
the scores, in standard deviations of the base's scores: from the same noise even a change that nobody can see wins most
comparisons, so the win rate alone cannot tell that nothing has happened yet, nor which of two points is the better one.

    failed     the run or its evaluation ended with an error
    destroyed  drift is above +10 %: whatever the scorer says, images are falling apart
    nothing    the 95 % interval of the win rate contains one half, or the gain is within 0.05 of zero
    worse      the interval lies below one half
    better     the interval lies above one half

The advice names the better point with the highest gain, which others cannot be told from it (their 95 % intervals
overlap), and what is wrong with the rest.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reward_models.files import read_json, read_lines

DRIFT = 0.1
"""More than this destroys images; training's own verdict warns at the same."""

GAIN = 0.05
"""Less than this is nothing; a quarter of a small effect (Cohen, 1988)."""

COLUMNS = {"accuracy": "{:.0%}", "drift": "{:+.1%}", "loss": "{:.4g}", "seconds": "{:.0f}"}

Row = Mapping[str, Any]
"""A point: values ("algorithm.beta=200", one an axis), verdict, and unless it failed seconds and what
`trained` and `judged` find."""


def trained(metrics: Path) -> dict[str, float | None]:
    """accuracy, loss and drift over the last tenth of the steps of a metrics.jsonl; None: not logged by the method."""
    lines = read_lines(metrics)

    def mean(name: str) -> float | None:
        seen = [line[f"policy/{name}"] for line in lines[-max(1, len(lines) // 10) :] if f"policy/{name}" in line]
        return sum(seen) / len(seen) if seen else None

    change, error = mean("winner_error_change"), mean("reference_error")
    drift = None if change is None or not error else change / error
    return {"accuracy": mean("accuracy"), "loss": mean("loss"), "drift": drift}


def judged(results: Path) -> dict[str, float]:
    """win_rate, low, high, n, and gain with gain_low and gain_high, by the first scorer in a file of eval/win_rate.py.

    Raises ValueError when all images of the base score the same: there is nothing to measure a gain in.
    """
    found = read_json(results)["scorers"][0]
    spread = statistics.pstdev(found["base_scores"])
    if not spread:
        raise ValueError(
            f"'{results}': {found['name']} gives all images of the base the same score; use another scorer"
        )
    gains = {"gain": "mean_difference", "gain_low": "mean_difference_low", "gain_high": "mean_difference_high"}
    own = {key: found[key] for key in ("win_rate", "low", "high", "n")}
    return own | {ours: found[theirs] / spread for ours, theirs in gains.items()}


def verdict(row: Row) -> str:
    """destroyed, nothing, worse or better, by the rules above."""
    if row["drift"] is not None and row["drift"] > DRIFT:
        return "destroyed"
    if row["low"] <= 0.5 <= row["high"] or abs(row["gain"]) < GAIN:
        return "nothing"
    return "better" if row["low"] > 0.5 else "worse"


def advice(rows: Sequence[Row]) -> str:
    """One sentence from the verdicts."""
    better = sorted((row for row in rows if row["verdict"] == "better"), key=lambda row: -row["gain"])
    said = [f"best: {_name(better[0])}, gain {better[0]['gain']:+.2f}" if better else "no point beats the base"]
    for row in better[1:]:
        like = row["gain_high"] >= better[0]["gain_low"]
        said.append(f"{_name(row)} {'cannot be told from it' if like else 'gains less'} ({row['gain']:+.2f})")
    said += [f"{_name(row)} {_what(row)}" for row in rows if row["verdict"] != "better"]
    return "; ".join(said)


def markdown(rows: Sequence[Row]) -> str:
    """The table, a line for each point; what is not known is blank."""
    keys = [value.partition("=")[0] for value in rows[0]["values"]]
    lines = [[*keys, "win rate [95 %]", "gain [95 %]", "implicit accuracy", "drift", "loss", "seconds", "verdict"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        shown = [value.partition("=")[2] for value in row["values"]] + [_rate(row), _gain(row)]
        shown += ["" if row.get(name) is None else text.format(row[name]) for name, text in COLUMNS.items()]
        lines.append([*shown, row["verdict"]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(row: Row) -> str:
    return " ".join(row["values"])


def _what(row: Row) -> str:
    """What is wrong with a point that is not better."""
    if row["verdict"] == "failed":
        return "failed"
    if row["verdict"] == "worse":
        return f"makes images worse ({row['gain']:+.2f})"
    if row["verdict"] == "destroyed":
        return f"drifts {row['drift']:+.0%}: images are being destroyed"
    if row["low"] <= 0.5 <= row["high"]:
        return "changes nothing yet: the interval contains one half"
    return f"changes nothing yet: scores moved by {row['gain']:+.2f} standard deviations"


def _rate(row: Row) -> str:
    return f"{row['win_rate']:.1%} [{row['low']:.1%}, {row['high']:.1%}]" if "win_rate" in row else ""


def _gain(row: Row) -> str:
    return f"{row['gain']:+.2f} [{row['gain_low']:+.2f}, {row['gain_high']:+.2f}]" if "gain" in row else ""
