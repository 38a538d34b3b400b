"""Test bed for alignment on a CPU: a small text-to-image world with shipped weights and an exact judge.

BASE is the shipped StableDiffusionPipeline, FLOW a StableDiffusion3Pipeline of the same world, PAIRS the shipped
preference pairs (samples of BASE, labelled by simulated annotators). Paths of models and data
sets may be `playground` (BASE and PAIRS) or `playground_flow` (FLOW). STUDENTS are few-step models by their number of
steps, distilled from BASE by `diffalign train distill`: `playground_one_step` and `playground_four_step`.
"""

from pathlib import Path

from diffalign.playground.judge import Judge

BASE = Path(__file__).parent / "base"
FLOW = Path(__file__).parent / "flow"
PAIRS = Path(__file__).parent / "pairs.parquet"
STUDENTS = {1: Path(__file__).parent / "one_step", 4: Path(__file__).parent / "four_step"}
SHIPPED = {
    "playground": BASE,
    "playground_flow": FLOW,
    "playground_one_step": STUDENTS[1],
    "playground_four_step": STUDENTS[4],
}

__all__ = ["BASE", "FLOW", "PAIRS", "SHIPPED", "STUDENTS", "Judge"]
