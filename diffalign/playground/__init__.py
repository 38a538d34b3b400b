"""A small text-to-image world with shipped weights and an exact judge: alignment proved on a laptop.

BASE is the shipped StableDiffusionPipeline, FLOW a StableDiffusion3Pipeline of the same world, PAIRS the shipped
preference pairs (samples of BASE, labelled by simulated annotators). Whatever takes the path of a model or of a data
set takes the word `playground` for BASE and PAIRS, and `playground_flow` for FLOW. STUDENTS draw in so many steps;
they were distilled from BASE by `diffalign train distill` and are `playground_one_step` and `playground_four_step`.
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
