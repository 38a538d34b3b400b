"""eval/win_rate.py and eval/report.py on two folders of playground scenes, judged exactly."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from diffalign.playground.judge import Judge
from diffalign.playground.world import BACKGROUNDS

ROOT = Path(__file__).parents[2]
JUDGE = "diffalign.playground:Judge"


def _recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "eval" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


win_rate, report = _recipe("win_rate"), _recipe("report")

PROMPTS = ("red circle on white", "blue square on black", "green triangle on pink")


def _folder(path: Path, backgrounds: tuple[str, ...]) -> Path:
    """Plain images of the given colours, in the layout of tools/generate.py."""
    (path / "images").mkdir(parents=True)
    rows = []
    for i, (prompt, background) in enumerate(zip(PROMPTS, backgrounds, strict=True)):
        colour = tuple(round(255 * x) for x in BACKGROUNDS[background])
        Image.new("RGB", (32, 32), colour).save(path / "images" / f"{i}.png")
        rows.append({"image": f"images/{i}.png", "prompt": prompt, "prompt_id": str(i), "seed": 0, "sample": 0})
    (path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The aligned images have the background that the prompt asks for in the first and last prompt, the base in one."""
    return (
        _folder(tmp_path / "base", ("black", "black", "black")),
        _folder(tmp_path / "aligned", ("white", "black", "pink")),
    )


def test_scores_are_the_judges_and_the_line_says_the_result(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "win_rate.json"
    assert win_rate.main([*map(str, folders), "--scorer", JUDGE, "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^{JUDGE}: win rate \.833 \[\.\d+, 1\.000\], n 3 pairs, 3 prompts, mean difference \+", printed)
    result = json.loads(out.read_text())
    (scorer,) = result["scorers"]
    assert (scorer["win_rate"], scorer["ties"], scorer["unit"]) == (pytest.approx(2.5 / 3), 1, Judge.unit)
    assert [row["prompt_id"] for row in result["pairs"]] == ["0", "1", "2"]
    differences = [a - b for a, b in zip(scorer["aligned_scores"], scorer["base_scores"], strict=True)]
    assert differences[0] > 0.9 and differences[1] == 0 and differences[2] > 0.9
    assert scorer["mean_difference"] == pytest.approx(scorer["mean_aligned"] - scorer["mean_base"])


def test_report_takes_what_win_rate_wrote(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = map(str, folders)
    file, out = tmp_path / "win_rate.json", tmp_path / "report"
    assert win_rate.main([base, aligned, "--scorer", JUDGE, "--out", str(file), "--device", "cpu"]) == 0
    assert report.main(["--base", base, "--aligned", aligned, "--win-rate", str(file), "--out", str(out)]) == 0
    assert "83.3 %" in (out / "index.html").read_text()
    assert len(list((out / "images").iterdir())) == 6


def test_folders_that_do_not_match_are_an_error_and_not_a_result(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, aligned = folders
    manifest = aligned / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:2]))
    out = tmp_path / "win_rate.json"
    assert win_rate.main([str(base), str(aligned), "--scorer", JUDGE, "--out", str(out)]) == 2
    assert "1 of 3 images of" in capsys.readouterr().err
    assert not out.exists()
    assert win_rate.main([*map(str, (base, base)), "--scorer", JUDGE, "--scorer", "no_such", "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert "no scorer 'no_such'" in printed.err and not printed.out, "nothing is scored before all names are known"
    assert report.main(["--base", "x", "--aligned", "y", "--win-rate", str(out), "--out", str(tmp_path / "r")]) == 2
    assert "win_rate.json" in capsys.readouterr().err


@pytest.mark.parametrize("same", [0, 2, 3])
def test_equal_images_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], same: int) -> None:
    """A LoRA that was not loaded draws the base's images: .500 alone would look like a result."""
    backgrounds = ("black", "white", "pink")
    other = tuple(b if i < same else "white" if b != "white" else "pink" for i, b in enumerate(backgrounds))
    folders = (_folder(tmp_path / "base", backgrounds), _folder(tmp_path / "aligned", other))
    out = tmp_path / "win_rate.json"
    assert win_rate.main([*map(str, folders), "--scorer", JUDGE, "--out", str(out), "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert json.loads(out.read_text())["equal_images"] == same
    assert ("2 of 3 pairs are the same image twice" in said) == (same == 2)
    assert ("all 3 pairs are the same image twice" in said) == (same == 3)
    assert ("same image twice" in said) == (same > 0)
    assert win_rate.main([str(folders[0])] * 2 + ["--scorer", JUDGE, "--out", str(out), "--device", "cpu"]) == 0
    assert "same image twice" not in capsys.readouterr().err, "a folder against itself is meant to be"
