"""A small text-to-image world with shipped weights and an exact judge: alignment proved on a laptop.

BASE is the shipped StableDiffusionPipeline, FLOW a StableDiffusion3Pipeline of the same world. STUDENTS draw in so many
steps; they were distilled from BASE by `diffalign train distill`. Whatever takes the path of a model takes the words of
SHIPPED for them, and whatever takes that of a data set those of SHIPPED_PAIRS: `playground` for a few hundred pairs of
BASE's own samples, `playground_own` for thousands of them, `playground_others` for as many of other generators.
"""

from pathlib import Path

from diffalign.playground.judge import Judge

BASE = Path(__file__).parent / "base"
FLOW = Path(__file__).parent / "flow"
STUDENTS = {1: Path(__file__).parent / "one_step", 4: Path(__file__).parent / "four_step"}
SHIPPED = {
    "playground": BASE,
    "playground_flow": FLOW,
    "playground_one_step": STUDENTS[1],
    "playground_four_step": STUDENTS[4],
}
SHIPPED_PAIRS = {
    "playground": Path(__file__).parent / "pairs.parquet",
    "playground_own": Path(__file__).parent / "own_pairs.parquet",
    "playground_others": Path(__file__).parent / "other_pairs.parquet",
}
PAIRS = SHIPPED_PAIRS["playground"]

__all__ = ["BASE", "FLOW", "PAIRS", "SHIPPED", "SHIPPED_PAIRS", "STUDENTS", "Judge"]
