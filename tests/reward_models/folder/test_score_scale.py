"""`reward-score` over 10,000 JPEGs of mixed sizes and 50 damaged files: flat memory, kill and resume, two processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reward_models.folder.cli import main

GOOD, DAMAGED, DISTINCT, FEW, BATCH = 10_000, 50, 300, 2_000, 32
SIZES = ((100, 80), (80, 100), (90, 90), (60, 110), (121, 83), (128, 50), (75, 75), (97, 101))
MEGABYTES = 24
"""Of memory that five times the images may add; 2 were measured. Decoded, the 8,000 more would take 8,000 * 3 * 8,000
bytes = 190 MB; their names, prompts and scores take 3 MB. The rest is for how the images of the threads overlap."""
SCORER = """
    class Red:
        differentiable, unit, scored = True, "share", 0
        def score(self, images, prompts):
            Red.scored += len(images)
            return images[:, 0].mean((1, 2))
"""
PEAKS = """
import resource, sys
from reward_models.folder.cli import main
folder, *settings = sys.argv[1:]
sys.path.insert(0, folder)
for items in ("few", "all"):
    code = main([f"{folder}/images/{items}.jsonl", "--out", f"{folder}/{items}.csv", *settings])
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, code)
"""
KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
from reward_models.folder.cli import main
journal, lines, *arguments = sys.argv[1:]

def kill():
    while not os.path.exists(journal) or Path(journal).read_bytes().count(b"\\n") < int(lines):
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
main(arguments)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ with 10,050 names for some 300 files, all.jsonl in a mixed order, few.jsonl with its first 2,000."""
    path = tmp_path_factory.mktemp("scale")
    (path / "scale_scorers.py").write_text(textwrap.dedent(SCORER))
    (path / "originals").mkdir()
    noise = np.random.default_rng(0)
    for i in range(DISTINCT):
        pixels = noise.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(SIZES[i % len(SIZES)]).save(path / f"originals/{i}.jpg")
    jpeg = (path / "originals/0.jpg").read_bytes()
    damaged = {"cut.jpg": jpeg[: len(jpeg) // 2], "empty.jpg": b"", "text.jpg": b"not an image"}
    for name, data in damaged.items():
        (path / "originals" / name).write_bytes(data)
    originals = [f"{i % DISTINCT}.jpg" for i in range(GOOD)] + [[*damaged][i % 3] for i in range(DAMAGED)]
    rows = []
    for i in noise.permutation(len(originals)):
        name = f"{i % 7}/{i}.jpg"
        (path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(path / "originals" / originals[i], path / "images" / name)
        rows.append(json.dumps({"image": name, "prompt": f"prompt {i // 4}", "damaged": int(i >= GOOD)}) + "\n")
    (path / "images/all.jsonl").write_text("".join(rows))
    (path / "images/few.jsonl").write_text("".join(rows[:FEW]))
    return path


@pytest.fixture(autouse=True)
def own_scorers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)


SETTINGS = ("--scorer", "scale_scorers:Red", "--batch-size", str(BATCH), "--device", "cpu", "--workers", "2")


def _arguments(folder: Path, items: str, out: Path) -> list[str]:
    return [str(folder / "images" / items), "--out", str(out), *SETTINGS]


@pytest.fixture(scope="module")
def peaks(folder: Path, forks: Any) -> dict[str, int]:
    """Peak memory in bytes of a process after a run over few and then after one over all images."""
    run = forks.run(PEAKS, str(folder), *SETTINGS)
    assert run.returncode == 0, run.stderr
    few, every = (line.split() for line in run.stdout.splitlines() if line.startswith("peak "))
    assert few[2] == every[2] == "2"
    return {"few": int(few[1]) * 1024, "all": int(every[1]) * 1024}


def test_memory_does_not_grow_with_the_number_of_images(peaks: dict[str, int]) -> None:
    assert peaks["all"] - peaks["few"] < MEGABYTES * 2**20


def test_one_row_for_each_good_image_and_a_reason_for_each_bad_one(folder: Path, peaks: dict[str, int]) -> None:
    listed = [json.loads(line) for line in (folder / "images/all.jsonl").read_text().splitlines()]
    with (folder / "all.csv").open(newline="") as file:
        rows = [(row["image"], row["prompt"]) for row in csv.DictReader(file)]
    assert rows == [(x["image"], x["prompt"]) for x in listed if not x["damaged"]] and len(rows) == GOOD
    failed = [json.loads(line) for line in (folder / "all.csv.failed.jsonl").read_text().splitlines()]
    assert [x["image"] for x in failed] == [x["image"] for x in listed if x["damaged"]] and len(failed) == DAMAGED
    assert {x["reason"].partition(":")[0] for x in failed} == {"damaged", "not an image that Pillow can read"}


def test_killed_halfway_and_resumed_equals_uninterrupted(
    folder: Path, peaks: dict[str, int], tmp_path: Path, forks: Any
) -> None:
    out = tmp_path / "few.csv"
    journal = out.with_name("few.csv.partial-0.jsonl")
    killed = forks.run(KILLED, str(journal), str(FEW // BATCH // 2), *_arguments(folder, "few.jsonl", out))
    assert killed.returncode == -signal.SIGKILL and not out.exists(), killed.stderr
    done = BATCH * (journal.read_bytes().count(b"\n") - 1)

    assert main([*_arguments(folder, "few.jsonl", out), "--resume"]) == 2
    scored = sys.modules["scale_scorers"].Red.scored
    failed = len((folder / "few.csv.failed.jsonl").read_text().splitlines())
    assert 0 < FEW - failed - done <= scored <= FEW - done, "what the journal has must not be scored again"
    _assert_same(folder / "few.csv", out)


def test_two_processes_write_the_table_of_one(folder: Path, peaks: dict[str, int], tmp_path: Path) -> None:
    """Threads stand for the processes: they share nothing but the files and the barrier."""
    out, barrier, codes = tmp_path / "few.csv", threading.Barrier(2, timeout=60), {}

    def process(rank: int) -> None:
        codes[rank] = main(
            _arguments(folder, "few.jsonl", out), rank=rank, world=2, wait=lambda: bool(barrier.wait(60)) and None
        )

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {0: 2, 1: 0}
    _assert_same(folder / "few.csv", out)


def _assert_same(whole: Path, out: Path) -> None:
    for suffix in ("", ".failed.jsonl", ".meta.json"):
        assert out.with_name(out.name + suffix).read_bytes() == whole.with_name(whole.name + suffix).read_bytes()
    assert not list(out.parent.glob("*.partial-*")) and not list(out.parent.glob("*.tmp"))
