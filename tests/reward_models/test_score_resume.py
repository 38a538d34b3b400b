"""`reward-score --resume` after a kill: nothing lost, nothing twice, the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from PIL import Image

from reward_models.cli import main
from reward_models.items import read_items
from reward_models.journal import Journal
from reward_models.scoring import Failed, Scored

ROOT = Path(__file__).parents[2]
SCORERS = """
    import os
    import time

    class Red:
        differentiable, unit, batches = True, "share", []
        def score(self, images, prompts):
            self.batches.append((tuple(images.shape), list(prompts)))
            time.sleep(float(os.environ.get("RED_SECONDS", "0")))
            return images[:, 0].mean((1, 2))
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """20 reds, each with its prompt beside it."""
    path = tmp_path / "images"
    path.mkdir()
    for i in range(20):
        Image.new("RGB", (8, 8), (12 * i, 0, 0)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"prompt {i // 4}")
    return path


@pytest.fixture(autouse=True)
def own_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scorers"
    folder.mkdir()
    (folder / "resume_scorers.py").write_text(textwrap.dedent(SCORERS))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "resume_scorers", raising=False)
    return folder


def _arguments(images: Path, out: Path, scorer: str) -> list[str]:
    return [str(images), "--scorer", scorer, "--out", str(out), "--batch-size", "2", "--device", "cpu"]


def test_killed_and_resumed_equals_uninterrupted(
    images: Path, tmp_path: Path, own_scorers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red = "resume_scorers:Red"
    whole, out = tmp_path / "whole/s.csv", tmp_path / "killed/s.csv"
    assert main(_arguments(images, whole, red)) == 0
    env = {**os.environ, "PYTHONPATH": f"{own_scorers}{os.pathsep}{ROOT}", "RED_SECONDS": "0.1"}
    command = [sys.executable, "-m", "reward_models.cli", *_arguments(images, out, red)]
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    journal, deadline = out.with_name("s.csv.partial-0.jsonl"), time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 7:  # the header and three batches
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    done = journal.read_bytes().count(b"\n") - 1
    assert 6 <= done < 20
    with journal.open("ab") as file:
        file.write(b'{"image": "19.png", "pro')  # what a kill in the middle of a write leaves

    assert main(_arguments(images, out, red)) == 1
    assert "is left from an unfinished run; add --resume, or delete it" in capsys.readouterr().err
    assert main([*_arguments(images, out, red), "--resume", "--scorer", "resume_scorers:Blue"]) == 1
    assert "was begun with --scorer resume_scorers:Red; " in capsys.readouterr().err
    seen = sys.modules["resume_scorers"].Red.batches
    seen.clear()
    assert main([*_arguments(images, out, red), "--resume"]) == 0
    assert sum(shape[0] for shape, _ in seen) == 20 - done
    assert out.read_bytes() == whole.read_bytes()
    assert out.with_name("s.csv.meta.json").read_bytes() == whole.with_name("s.csv.meta.json").read_bytes()
    assert not journal.exists()


def test_what_failed_before_the_kill_is_not_tried_again(images: Path, tmp_path: Path) -> None:
    """One batch of two is in the journal: its outcomes are taken from there, the failure as one."""
    out, red = tmp_path / "s.jsonl", "resume_scorers:Red"
    first, second = read_items(images)[:2]
    with Journal(out, [red], rank=3) as journal:
        journal.append([Failed(first, "why"), Scored(second, (0.125,))])
    assert main([*_arguments(images, out, red), "--resume"]) == 2
    assert sum(shape[0] for shape, _ in sys.modules["resume_scorers"].Red.batches) == 18
    assert json.loads(out.read_text().splitlines()[0]) == {"image": second.image, "prompt": second.prompt, red: 0.125}
    (failed,) = map(json.loads, (tmp_path / "s.jsonl.failed.jsonl").read_text().splitlines())
    assert failed == {"image": first.image, "prompt": first.prompt, "reason": "why"}


def test_a_kill_while_the_first_line_is_written(images: Path, tmp_path: Path) -> None:
    out, red = tmp_path / "s.csv", "resume_scorers:Red"
    (tmp_path / "s.csv.partial-0.jsonl").write_text('{"scorers": ["res')
    (item, *_) = read_items(images)
    with Journal(out, [red], rank=0) as journal:
        journal.append([Scored(item, (0.125,))])
    assert main([*_arguments(images, out, red), "--resume"]) == 0
    assert out.read_text().splitlines()[1] == "0.png,prompt 0,0.125"
