"""Training with a judge as the reward: settings with commas and colons, and a key that reaches no file of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stand_in

KEY = "sk-secret-0123456789"


def _reddish(images: list[Any], texts: list[str]) -> str:
    assert texts[0].startswith("Rate, please: ")
    return f"Red: {images[0].resize((1, 1)).getpixel((0, 0))[0]}"


def test_a_judge_is_a_reward_and_its_key_is_in_no_file_of_the_run(
    tmp_path: Path, recipe: Callable, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    settings = [
        "trainer.steps=1",
        "rollouts.group_size=2",
        "data.batch_size=1",
        "data.limit=2",
        "monitor.prompts=null",
        "monitor.held_out=null",
    ]
    settings += ["hooks.sample_every=0", "hooks.verify_export=false", f"run.folder={tmp_path}/run"]
    with stand_in.judge(_reddish) as server:
        scorer = f"judge,url={server.url},model=m,template='Rate, please: {{prompt}}. Red (0-255): X'"
        recipe("ddpo", "--config", "playground", *settings, f'reward.scorers=["{scorer}"]')
        assert len(server.bodies) == 2 and server.headers[0]["Authorization"] == f"Bearer {KEY}"
    config = (tmp_path / "run/config.yaml").read_text()
    assert "Rate, please: {prompt}" in " ".join(config.split())
    files = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    said = capfd.readouterr()
    assert len(files) > 5 and not [x for x in files if KEY.encode() in x] and KEY not in said.out + said.err
