"""Test bed for alignment on a CPU: a small text-to-image world with shipped weights and an exact judge.

BASE is the shipped StableDiffusionPipeline, FLOW a StableDiffusion3Pipeline of the same world. STUDENTS are few-step
models by their number of steps, distilled from BASE by `diffalign train distill`. Paths of models may be the names in
SHIPPED (`playground`, `playground_flow`, `playground_one_step`, `playground_four_step`). Paths of data sets may be the
names in SHIPPED_PAIRS: `playground` holds a few hundred pairs of samples of BASE, `playground_own` thousands of them,
and `playground_others` as many of other generators. All are labelled by simulated annotators.
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
