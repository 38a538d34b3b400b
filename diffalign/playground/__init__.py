"""A small text-to-image world with shipped weights and an exact judge: alignment proved on a laptop.

BASE is the shipped StableDiffusionPipeline, PAIRS the shipped preference pairs (its own samples, labelled by simulated
annotators). Whatever takes the path of a model or of a data set takes the word `playground` for them.
"""

from pathlib import Path

from diffalign.playground.judge import Judge

BASE = Path(__file__).parent / "base"
PAIRS = Path(__file__).parent / "pairs.parquet"

__all__ = ["BASE", "PAIRS", "Judge"]
