"""Commands of the demo, and the summary of their results."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from diffalign.commands import demo as story
from diffalign.commands import launch
from diffalign.report.preference_rate import compare

IDS = ["a", "a", "b", "b"]
BASE, ALIGNED, RANDOM = [0.0, 4.0, 0.0, 4.0], [3.0, 6.0, 2.0, 6.0], [1.0, 6.0, -1.0, 5.0]
KEYS = ["people_prefer", "people_prefer_low", "people_prefer_high", "gain_sd", "gain_sd_low", "gain_sd_high"]
KEYS += ["match_change", "diversity_change", "direction", "n", "seconds", "export", "grid"]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands in order. None is run; win rate commands write a fixed file."""
    called: list[list[str]] = []

    def call(command: list[str], environment: dict[str, str]) -> int:
        called.append(command[3:])
        if "win_rate" in command:
            scores = RANDOM if Path(command[6]).name == "random" else ALIGNED
            found = compare(BASE, scores, IDS, name="judge", choice_temperature=0.35)
            result = {"name": "judge", **found, "base_scores": BASE, "aligned_scores": scores}
            beside = {"match": {"change": -0.01}, "diversity": {"change": 0.02}}
            pairs = [{"prompt_id": i} for i in IDS]
            Path(command[-1]).write_text(json.dumps({"scorers": [result], "pairs": pairs, **beside}))
        return 0

    monkeypatch.setattr(launch, "call", call)
    return called


def test_fields_of_the_demo_summary(tmp_path: Path, commands: list[list[str]], capsys: Any) -> None:
    assert story.demo(tmp_path / "demo") == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert sorted(summary) == sorted(KEYS)
    assert (summary["gain_sd"], summary["direction"], summary["n"]) == (1.125, 1.0, 4)
    assert (summary["match_change"], summary["diversity_change"]) == (-0.01, 0.02)
    assert summary["grid"] == str(tmp_path / "demo" / "report" / "grid.png")
    said = capsys.readouterr().out
    assert f"people choose the aligned image in {100 * summary['people_prefer']:.1f} % of 4 pairs" in said
    assert "Label effect" not in said and not any("random" in " ".join(words) for words in commands)


def test_random_labels_add_the_label_effect_to_the_summary(
    tmp_path: Path, commands: list[list[str]], capsys: Any
) -> None:
    """As by hand in test_preference_rate.py."""
    assert story.demo(tmp_path / "demo", random_labels=True) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert sorted(summary) == sorted([*KEYS, "label_effect_sd"]) and summary["label_effect_sd"] == 0.75
    assert "+0.75 standard deviations (95 % interval +0.50 to +1.00)" in capsys.readouterr().out
    runs = [words for words in commands if words[0] == "train"]
    assert len(runs) == 2
    other = [word.partition("=")[0] for word in runs[1] if word not in runs[0]]
    assert other == ["run.folder", "data.path"], "the rest is equal"


def test_demo_commands_use_no_guidance() -> None:
    for line in (story.STORY + story.CONTROL).splitlines():
        words = shlex.split(line, comments=True)
        if words[1:2] == ["generate"]:
            assert words[words.index("--guidance") + 1] == "1", line


def test_the_seed_reaches_training_and_images(tmp_path: Path, commands: list[list[str]]) -> None:
    assert story.demo(tmp_path / "demo", seed=7) == 0
    assert not any("SEED" in word for words in commands for word in words)
    assert [words[-2:] for words in commands if words[0] == "train"] == [["run.seed=7", "backbone.seed=7"]]
    seeds = [words[words.index("--seed") + 1] for words in commands if words[0] == "generate"]
    assert seeds == ["7", "7"]
