"""Evidence for a comparison of two models: preference with intervals, and a static page that opens from disk."""

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
