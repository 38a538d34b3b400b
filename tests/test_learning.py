"""One seed of each learning experiment: alignment raises the true preference, flipped labels lower it."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffalign.playground import BASE
from diffalign.playground.build import report_card
from diffalign.playground.ratings import write_ratings
from reward_models import load_scorer

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
SCORERS: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "scorers.py"), run_name="scorers")
PERSONAL: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "personal.py"), run_name="personal")
LEARNING: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "learning.py"), run_name="learning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return LEARNING["World"](tmp_path_factory.mktemp("world"))


ON_TWO_CORES = ("diffusion_dpo/lora", "inpo/lora", "smpo/lora", "rank_dpo/lora", "kto/lora", "mapo/lora")
"""The other cases of the benchmark take too long to be repeated every time."""


@pytest.mark.learning
@pytest.mark.parametrize("case", [*ON_TWO_CORES, "diffusion_dpo/full"])
def test_true_labels_raise_the_preference_on_held_out_prompts(world: Any, case: str) -> None:
    row = LEARNING["learn"](world, case, "true", 0)
    print(row)
    assert row["n"] == 256
    assert row["low"] > 0.5, row


@pytest.mark.learning
@pytest.mark.parametrize("case", ON_TWO_CORES)
def test_flipped_labels_lower_it(world: Any, case: str) -> None:
    row = LEARNING["learn"](world, case, "flipped", 0)
    print(row)
    assert row["high"] < 0.5, row


@pytest.mark.learning
@pytest.mark.parametrize("case", ["diffusion_dpo/lora"])
def test_random_labels_do_neither(world: Any, case: str) -> None:
    """From other noise: from equal noise any update shifts all images alike, and wins or loses nearly always."""
    row = LEARNING["learn"](world, case, "random", 0)
    print(row)
    _, low, high = row["other_noise"]
    assert low < 0.5 < high, row


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ratings")
    return write_ratings(folder / "train", SCORERS["PROMPTS"]), SCORERS["HeldOut"](folder / "held_out")


@pytest.mark.learning
@pytest.mark.parametrize("name", SCORERS["RECIPES"])
def test_a_scorer_learns_the_true_preference(name: str, ratings: Any, tmp_path: Path) -> None:
    """From nothing, in minutes: three of four pairs of held-out captions in the judge's order, and every aspect better
    than chance."""
    file, held_out = ratings
    SCORERS["train"](name, file, tmp_path / "run", 0)
    row = SCORERS["measure"](load_scorer(str(tmp_path / "run" / "export"), "cpu"), held_out)
    print(row)
    assert row["accuracy"] >= 0.75, row
    assert all(aspect["low"] > 0.5 for aspect in row.get("aspects", {}).values()), row
    assert ("aspects" in row) == (name == "vp_score")


REWARDED = (
    "refl/lora",
    "draft/lora",
    "pso/four_step",
    "pso_offline/four_step",
    "diff_instruct_star/one_step",
    "r0 plus/one_step",
    "r0/four_step",
)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """worlds("playground_one_step"): its World, made when first asked for."""
    made: dict[str, Any] = {}

    def of(model: str) -> Any:
        if model not in made:
            made[model] = LEARNING["World"](tmp_path_factory.mktemp("worlds") / model, model)
        return made[model]

    return of


@pytest.mark.learning
@pytest.mark.parametrize("case", REWARDED)
def test_rewards_and_own_samples_raise_the_true_preference(worlds: Callable[[str], Any], case: str) -> None:
    """The judge is not the scorer that was trained on; the monitor has nothing to say."""
    row = LEARNING["learn"](worlds(LEARNING["CASES"][case].model), case, "true", 0)
    print(row)
    assert row["n"] == 256 and row["low"] > 0.5, row
    assert not row.get("warnings"), row


@pytest.mark.learning
def test_the_plain_diffusion_loss_spoils_a_one_step_model(worlds: Callable[[str], Any]) -> None:
    row = LEARNING["learn"](worlds("playground_one_step"), "naive/one_step", "true", 0)
    print(row)
    assert row["high"] < 0.5 and row["points"] < 0, row


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return PERSONAL["Town"](tmp_path_factory.mktemp("town"))


@pytest.mark.learning
def test_strangers_are_known_from_a_few_choices(town: Any) -> None:
    """PAL, from 4 and from 20 choices, against the Bradley-Terry scorer that knows no persons: 8 points more at least;
    its doubt falls, and its probabilities are right to 5 points."""
    pal, one = (
        {row["shots"]: row for row in PERSONAL["score_strangers"](town, head, 0)} for head in ("pal", "one for all")
    )
    print(pal, one)
    for shots in (4, 20):
        assert pal[shots]["accuracy"] >= one[shots]["accuracy"] + 0.08
        assert pal[shots]["low"] > one[shots]["high"]
        assert pal[shots]["calibration_error"] <= 0.05
    assert pal[4]["doubt"] > pal[10]["doubt"] > pal[20]["doubt"] > pal[50]["doubt"]


@pytest.mark.learning
def test_four_choices_personalise_a_generator(town: Any) -> None:
    """PPD for strangers: more to their own taste than the base, and than what somebody else's embedding gives; nobody's
    are the base's; prompts are followed as before; a mixture leads from one taste to the other."""
    row = PERSONAL["personalise"](town, 0)
    print(row)
    assert row["own vs base"][1] > 0.5 and row["own vs other"][1] > 0.5, row
    assert row["nobody vs base"] == [0.5, 0.5, 0.5, 0.0], "the same images"
    assert row["match of own"] >= row["match of base"] - 0.02, row
    _, first, second = zip(*row["mixture"], strict=True)
    assert list(first) == sorted(first) and list(second) == sorted(second, reverse=True), row
    assert first[-1] > first[0] and second[-1] < second[0]


@pytest.mark.learning
def test_maxmin_lifts_the_group_that_is_worst_off(town: Any) -> None:
    plain, fair = PERSONAL["in_conflict"](town, 0)
    print(plain, fair)
    worst_plain, worst_fair = (min((row[g] for g in ("bright", "faded")), key=lambda r: r[0]) for row in (plain, fair))
    assert worst_fair[1] > worst_plain[2], (plain, fair)


class Saturation:
    """The colour of the pixels, whatever they show: a scorer made to be hacked."""

    differentiable, unit = True, "raw"

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return 10 * (images.amax(1) - images.amin(1)).mean((1, 2))


@pytest.mark.learning
def test_the_monitor_warns_before_the_true_preference_falls(worlds: Callable[[str], Any]) -> None:
    """Climbing colour alone loses the judge's points; the monitor stops the run before 5 of 100 are lost."""
    world = worlds("playground_one_step")
    lost = {}
    for stop in ("true", "false"):
        changes = (f"reward.scorers=['{__name__}:Saturation']", f"monitor.stop={stop}", "monitor.every=5")
        changes += ("algorithm.guidance_weight=0", "optimizer.lr=1e-3", "sampler.steps=1")
        LEARNING["CASES"]["hacked"] = LEARNING["CASES"]["r0 plus/one_step"]._replace(
            changes=(*changes, "backbone.path=playground_one_step")
        )
        row = LEARNING["learn"](world, "hacked", "true", int(stop == "false"))
        print(row)
        assert row["warnings"] > 0
        lost[stop] = -row["points"] / 9
    assert lost["true"] < 0.05 < lost["false"], lost


@pytest.mark.learning
def test_demo(tmp_path: Path) -> None:
    """People prefer the aligned images more often than not, from independent noise, with the whole interval."""
    done = subprocess.run(
        [sys.executable, "-m", "diffalign.commands.cli", "demo", "--out", str(tmp_path / "demo")], check=False
    )
    assert done.returncode == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    print(summary)
    assert summary["n"] >= 256
    assert summary["people_prefer_low"] > 0.5, summary
    assert Path(summary["export"]).exists() and Path(summary["grid"]).exists()
    assert (tmp_path / "demo" / "report" / "index.html").exists()


@pytest.mark.learning
def test_the_shipped_model_is_as_good_as_promised() -> None:
    """On held-out combinations: colour, background and size right in 95 of 100 samples, the shape in 85."""
    pipeline = StableDiffusionPipeline.from_pretrained(BASE).to(torch.float32)
    card = report_card(pipeline, n=360)
    print(card)
    for aspect in ("colour", "background", "size"):
        assert card[aspect] >= 0.95, card
    assert card["shape"] >= 0.85, card
