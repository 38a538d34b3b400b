"""Comparison of two models: preference with confidence intervals, and a static HTML report."""

from diffalign.report.comparison import Estimate, compare, label_effect
from diffalign.report.manifest import Pair, read_manifest, read_pairs
from diffalign.report.page import write_report
from diffalign.report.win_rate import WinRate, holm, paired_win_rate

__all__ = [
    "Estimate",
    "Pair",
    "WinRate",
    "compare",
    "holm",
    "label_effect",
    "paired_win_rate",
    "read_manifest",
    "read_pairs",
    "write_report",
]
