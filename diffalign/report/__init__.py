"""Comparison of two models: preference with confidence intervals, and a static HTML report."""

from diffalign.report.equal_noise import WinRate, holm, paired_win_rate
from diffalign.report.manifest import Pair, read_groups, read_manifest, read_pairs
from diffalign.report.page import write_report
from diffalign.report.preference_rate import Estimate, compare, label_effect

__all__ = [
    "Estimate",
    "Pair",
    "WinRate",
    "compare",
    "holm",
    "label_effect",
    "paired_win_rate",
    "read_groups",
    "read_manifest",
    "read_pairs",
    "write_report",
]
