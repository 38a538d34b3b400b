"""A small text-to-image world with shipped weights and an exact judge: alignment proved on a laptop.

BASE is the shipped StableDiffusionPipeline, FLOW a StableDiffusion3Pipeline of the same world, PAIRS the shipped
preference pairs (samples of BASE, labelled by simulated annotators). Whatever takes the path of a model or of a data
set takes the word `playground` for BASE and PAIRS, and `playground_flow` for FLOW.
"""

from pathlib import Path

from diffalign.playground.judge import Judge

BASE = Path(__file__).parent / "base"
FLOW = Path(__file__).parent / "flow"
PAIRS = Path(__file__).parent / "pairs.parquet"
SHIPPED = {"playground": BASE, "playground_flow": FLOW}

__all__ = ["BASE", "FLOW", "PAIRS", "SHIPPED", "Judge"]
