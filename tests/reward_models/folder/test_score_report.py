"""Other outputs of `reward-score`: summary, best of N, the page, cards, converted files."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from reward_models.folder import tables
from reward_models.folder.cards import card_text
from reward_models.folder.cli import main
from reward_models.folder.item import Item
from reward_models.folder.report import best_rows, longer_prompts, summarise
from reward_models.loading import SCORERS

RED, GREEN = "report_scorers:Red", "report_scorers:Green"
OWN_SCORERS = """
    class Red:
        differentiable, unit, channel = True, "share", 0
        def score(self, images, prompts):
            return images[:, self.channel].mean((1, 2))

    class Green(Red):
        unit, channel = "<u>", 1
"""


@pytest.fixture(autouse=True)
def own_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "scorers"
    folder.mkdir()
    (folder / "report_scorers.py").write_text(textwrap.dedent(OWN_SCORERS))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "report_scorers", raising=False)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """40 images, 10 per prompt: image i has red 5 i and green 200 - 5 i; image 7 is damaged."""
    path, rows = tmp_path / "images", []
    path.mkdir()
    for i in range(40):
        Image.new("RGB", (400, 8), (5 * i, 200 - 5 * i, 0)).save(path / f"{i}.png")
        rows.append({"image": f"{i}.png", "prompt": f"<b>prompt</b> {i % 4}"})
    (path / "7.png").write_text("no image")
    (path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _run(*arguments: object) -> int:
    return main([*map(str, arguments), "--scorer", RED, "--scorer", GREEN, "--device", "cpu", "--workers", "1"])


def test_summary_by_hand() -> None:
    """Of 0, 1, 2, 3, 4: mean 2, variance (4 + 1 + 0 + 1 + 4) / 5 = 2; 5 % lies at 0.05 * 4 = 0.2, 25 % at 1."""
    summary = summarise(np.array([3.0, np.nan, 0.0, 1.0, 4.0, 2.0]))
    assert (summary["count"], summary["mean"], summary["min"], summary["max"]) == (5, 2.0, 0.0, 4.0)
    assert summary["std"] == pytest.approx(2**0.5)
    quantiles = {"1%": 0.04, "5%": 0.2, "25%": 1.0, "50%": 2.0, "75%": 3.0, "95%": 3.8, "99%": 3.96}
    assert summary["quantiles"] == pytest.approx(quantiles)
    nothing = summarise(np.array([np.nan]))
    assert nothing["count"] == 0 and nothing["mean"] is None and set(nothing["quantiles"].values()) == {None}


def test_best_of_n_by_hand() -> None:
    """The first of equal images wins; failed images are ignored; a prompt with only failed images has no row."""
    rows = [Item(name, prompt, Path(name)) for name, prompt in zip("123456", "abaacb", strict=True)]
    nan = (np.nan, np.nan)
    scores = np.array([(0.5, 0.1), (1.0, 1.0), (0.5, 0.7), nan, nan, (1.5, 0.0)])
    assert list(best_rows(rows, scores, ["x", "y"])) == [
        ("a", "x", "1", 0.5, 2),
        ("a", "y", "3", 0.7, 2),
        ("b", "x", "6", 1.5, 2),
        ("b", "y", "2", 1.0, 2),
    ]


def test_best_is_a_table_of_its_own(images: Path, tmp_path: Path) -> None:
    assert _run(images, "--out", tmp_path / "s.parquet", "--best", tmp_path / "best.csv") == 2
    with (tmp_path / "best.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["prompt"], r["scorer"], r["image"], r["of"]) for r in rows] == [
        (f"<b>prompt</b> {p}", scorer, image, "9" if p == 3 else "10")
        for p in range(4)
        for scorer, image in ((RED, f"{36 + p}.png"), (GREEN, f"{p}.png"))
    ]
    assert float(rows[0]["score"]) == pytest.approx(180 / 255)


class _Page(HTMLParser):
    """Every tag with its attributes, and the text between."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_shows_the_worst_and_the_best_and_needs_no_other_file(images: Path, tmp_path: Path) -> None:
    report = tmp_path / "page/s.html"
    assert _run(images, "--out", tmp_path / "s.csv", "--report", report) == 2
    text = report.read_text(encoding="utf-8")
    page = _Page(text)
    shown = [a for tag, a in page.tags if tag == "img"]
    order = [i for i in range(40) if i != 7]
    red = [order[:16], order[::-1][:16]]
    sheets = [*red, *red[::-1]]  # more red means less green
    assert [a["alt"] for a in shown] == [f"{i}.png" for sheet in sheets for i in sheet]
    kind, _, data = (shown[0]["src"] or "").partition(",")
    thumbnail = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg;base64" and thumbnail.size == (160, 3)
    assert "39 images scored, 1 failed" in page.text and "(<u>)" in page.text and "<b>prompt</b> 0" in page.text
    assert not [tag for tag, a in page.tags if tag in ("script", "link", "u")]
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    meta = json.loads((tmp_path / "s.csv.meta.json").read_text())
    for value in meta["scorers"][RED]["quantiles"].values():
        assert f"{value:.5g}" in page.text
    counts = [int(n) for n in re.findall(r": (\d+)</title>", text)]
    assert len(counts) == 2 * 40 and sum(counts) == 2 * 39


def test_page_without_a_single_score(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    folder.mkdir()
    (folder / "0.png").write_text("no image")
    report, best = tmp_path / "s.html", tmp_path / "best.jsonl"
    assert _run(folder, "--prompt", "x", "--out", tmp_path / "s.csv", "--report", report, "--best", best) == 2
    assert report.read_text().count("No image was scored.") == 2 and best.read_text() == ""
    assert (tmp_path / "s.csv").read_text() == f"image,prompt,{RED},{GREEN}\n"


def test_parquet_in_pieces_is_one_table(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run(images, "--out", tmp_path / "whole.parquet") == 2
    monkeypatch.setattr(tables, "ROW_GROUP", 16)
    assert _run(images, "--out", tmp_path / "pieces.parquet") == 2
    assert pq.ParquetFile(tmp_path / "pieces.parquet").num_row_groups == 3
    whole, pieces = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "pieces"))
    assert pieces.equals(whole, check_metadata=True) and whole.num_rows == 39


def test_the_same_image_and_prompt_twice_has_two_rows(images: Path, tmp_path: Path) -> None:
    rows = [("3.png", "x"), ("3.png", "y"), ("3.png", "x"), ("7.png", "x"), ("7.png", "x")]
    (images / "list.jsonl").write_text("".join(json.dumps({"image": i, "prompt": p}) + "\n" for i, p in rows))
    assert _run(images / "list.jsonl", "--out", tmp_path / "s.jsonl", "--batch-size", "2") == 2
    table = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [(r["image"], r["prompt"]) for r in table] == rows[:3] and len({r[RED] for r in table}) == 1
    assert len((tmp_path / "s.jsonl.failed.jsonl").read_text().splitlines()) == 2


def test_info_prints_a_card_or_all_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "pickscore"]) == 0
    assert capsys.readouterr().out == card_text("pickscore") + "\n"
    assert main(["info"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(SCORERS)


def test_convert_writes_the_requested_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"a.weight": torch.arange(6.0).reshape(2, 3)}
    torch.save(state, tmp_path / "a.pt")
    assert main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors")]) == 0
    assert "written: " in capsys.readouterr().out
    assert load_file(tmp_path / "a.safetensors")["a.weight"].tolist() == state["a.weight"].tolist()
    assert main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors"), "--to", "hf"]) == 1
    assert "is not a CLIP checkpoint" in capsys.readouterr().err


def test_prompts_are_counted_a_few_at_a_time() -> None:
    """Of 5,000 prompts, repeated once, every tenth has 11 words; 10 are the limit."""
    sizes = []

    class Words:
        def token_counts(self, prompts: list[str]) -> tuple[int, list[int]]:
            sizes.append(len(prompts))
            return 10, [len(text.split()) for text in prompts]

    texts = [f"{i}" + " word" * (10 if i % 10 == 3 else 2) for i in range(5000)]
    found = longer_prompts(Words(), iter(texts * 2))
    assert found == {"limit": 10, "count": 500, "of": 5000, "first": texts[3]}
    assert max(sizes) <= 1000 and sum(sizes) == 5000
    assert longer_prompts(Words(), iter(["a b"])) is None and longer_prompts(object(), iter(texts)) is None
