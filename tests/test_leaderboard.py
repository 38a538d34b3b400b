"""benchmarks/leaderboard.py: the chosen setting, what is run again, and the numbers of its page. No training."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RUN = {"people_prefer": 0.7, "people_prefer_low": 0.6, "people_prefer_high": 0.8, "gain_sd": 0.5, "gain_sd_low": 0.4}
RUN |= {"gain_sd_high": 0.6, "match": 0.97, "diversity": 0.12, "drift": 0.01, "forwards": 100, "seconds": 3.0}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module leaderboard; its neighbours are modules of the same folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("leaderboard")
    for name in [name for name in sys.modules if name.startswith("leaderboard") or name == "results_file"]:
        del sys.modules[name]


class World:
    """Runs whose numbers depend on the setting and the labels alone."""

    def __init__(self, better: str):
        self.better, self.ran = better, list[tuple[str, str, int, str]]()

    def run(self, row: Any, settings: Any, labels: str, seed: int, prompts: str) -> Any:
        self.ran.append((row.name, labels, seed, prompts))
        good = labels == "true" and self.better in settings
        found = RUN | {"people_prefer": 0.9 if good else 0.5, "gain_sd": float(good)}
        noise = np.random.default_rng(seed).normal(size=60)
        return found, {"prefer": (noise / 10 + found["people_prefer"]).tolist(), "gain": (noise + good).tolist()}


def test_the_best_setting_is_measured_once_and_again_when_another_becomes_best(modules: Any, tmp_path: Path) -> None:
    row, world = modules.ROWS["diffusion_dpo/playground/own"], World("optimizer.lr=1e-3")
    for tried, runs in ((1, 1), (1, 0), (2, 3), (2, 0)):
        board = modules.Board(tmp_path)  # as a new process reads it
        world.ran.clear()
        list(modules.tune(board, world, row, tried))
        list(modules.measure(board, world, row, "true", 0))
        assert len(world.ran) == runs, (tried, world.ran)
    (found,) = modules.Board(tmp_path).rows["runs"]
    assert found["settings"][-1] == "optimizer.lr=1e-3" and found["people_prefer"] == 0.9
    assert len(board.rows["tuning"]) == 2 and len(board.rows["prompts"]) == 1


def test_effects_are_paired_by_seed_and_caption(modules: Any, tmp_path: Path) -> None:
    """The noise of runs with one seed is the same here, so the label effect is exactly 1 with no interval."""
    page, row = importlib.import_module("leaderboard_page"), modules.ROWS["diffusion_dpo/playground/own"]
    board, world = modules.Board(tmp_path), World("algorithm.beta=65")
    for labels, seed in (("true", 0), ("true", 1), ("random", 1), ("random", 0), ("true", 2)):
        list(modules.measure(board, world, row, labels, seed))
    effect = page.Line(row, board.rows).label_effect()
    assert tuple(effect) == pytest.approx((1, 1, 1))
    gain = page.pooled(page.Line(row, board.rows).matrix("gain", "true"))
    assert gain.low < 1 < gain.high and gain.high - gain.low < 1


def test_rows_that_lose_diversity_stand_last_beside_what_choosing_loses(modules: Any, tmp_path: Path) -> None:
    page, board = importlib.import_module("leaderboard_page"), modules.Board(tmp_path)
    base = {"model": "playground", "regime": "own", "labels": "true", "seed": 0, "settings": []}
    for name, gain, diversity in (("base", 0.0, 0.12), ("best of 2 by judge", 0.5, 0.114)):
        board.rows["runs"].append({**RUN, **base, "algorithm": name, "gain_sd": gain, "diversity": diversity})
    for name in ("inpo", "sft", "diffusion_dpo"):
        row = modules.ROWS[f"{name}/playground/own"]
        list(modules.measure(board, World(row.grid[0][0] if name == "diffusion_dpo" else "none"), row, "true", 0))
    board.rows["runs"][-1]["diversity"] = 0.1
    lines = page.table(board.rows).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["sft", "inpo", "diffusion_dpo **loses diversity**"]
    assert "-16.7% | beyond -5.0%" in lines[-1] and page.choosing_loses(board.rows, 0.25) == "-2.5%"
