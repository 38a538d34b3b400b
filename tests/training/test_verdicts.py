"""The verdict at the end of a run and the values in its progress bar: no claims beyond the data of the last steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffalign.algorithms.diff_instruct_star import DiffInstructStar
from diffalign.algorithms.diffusion_dpo import DiffusionDPO
from diffalign.algorithms.draft import DRaFT
from diffalign.algorithms.inpo import InPO
from diffalign.algorithms.kto import KTO
from diffalign.algorithms.mapo import MaPO
from diffalign.algorithms.personal_reward import PersonalReward
from diffalign.algorithms.ppd import PPD
from diffalign.algorithms.pso import PSO, PSOCustomization
from diffalign.algorithms.r0 import R0
from diffalign.algorithms.rank_dpo import RankDPO
from diffalign.algorithms.refl import ReFL
from diffalign.algorithms.reward_training import RewardTraining
from diffalign.algorithms.sft import SFT
from diffalign.types import RecentMetrics

RANKING = (DiffusionDPO, InPO, KTO, PPD, PSO, PSOCustomization, RankDPO)
OTHERS = (DiffInstructStar, DRaFT, MaPO, PersonalReward, R0, ReFL, RewardTraining, SFT)
SHORT = ["hooks.checkpoint_every=0", "hooks.sample_every=0", "hooks.verify_export=false", "run.log_every=1"]


class Constant:
    """Scorer with the same score for all images."""

    differentiable, unit = True, "raw"

    def score(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return 0 * images.mean((1, 2, 3)) + 0.5


@pytest.mark.parametrize("kind", [*RANKING, *OTHERS], ids=lambda kind: kind.__name__)
def test_verdicts_without_metrics_claim_nothing(kind: Any) -> None:
    """Without metrics, as after steps of ties, and with each metric alone: one line without a claim."""
    it: Any = SimpleNamespace(aspects=("overall",))
    names = ("policy/reward", "policy/accuracy", "policy/winner_error_change", "policy/reference_error")
    for recent in (
        RecentMetrics({}, {}, 8),
        *(RecentMetrics({name: 0.8}, {}, 8) for name in names),
        RecentMetrics(dict.fromkeys(names, 0.6), {}, 8),
    ):
        said = kind.verdict(it, recent)
        assert "\n" not in said and ", the policy ranks" not in said and "destroys" not in said
    many = RecentMetrics({"policy/accuracy": 0.6, "policy/reward": 1.0}, {"policy/accuracy": 0.01}, 1000)
    assert (", the policy ranks images as " in kind.verdict(it, many)) == (kind in RANKING)


def test_verdict_after_three_steps_says_too_few(
    tmp_path: Path, pairs_file: Path, recipe: Callable, capsys: Any
) -> None:
    settings = [f"run.folder={tmp_path / 'run'}", f"data.path={pairs_file}", "data.batch_size=4", "trainer.steps=3"]
    recipe("diffusion_dpo", "--config=playground", *settings, *SHORT, "data.draws_per_sample=null")
    said = capsys.readouterr()
    assert "too few to say whether the policy ranks images as people did" in said.out
    assert "one step is too few to measure drift" in said.out
    assert re.search(r"train: 100%.*loss 0\.\d+, accuracy [\d.]+", said.err), "the bar shows loss and accuracy"


def test_a_constant_scorer_ends_with_a_verdict_about_ties(tmp_path: Path, recipe: Callable, capsys: Any) -> None:
    """All pairs are ties. The run ends normally, and the verdict says that nothing was learned."""
    settings = [f"run.folder={tmp_path / 'run'}", f"reward.scorers=['{__name__}:Constant']", "monitor.prompts=null"]
    recipe("pso", "--config=playground", *settings, *SHORT, "trainer.steps=2", "data.batch_size=2")
    said = capsys.readouterr()
    assert "all preferences of the last steps were ties" in said.out and (tmp_path / "run" / "export").exists()
    assert re.search(r"train: 100%.*loss .*reward 0\.5", said.err)
