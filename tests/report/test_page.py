"""The report page: escaping, no network, the gallery, the curves, folders that do not match."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign.report import Pair, compare, read_manifest, read_pairs, write_report
from diffalign.report.curves import POINTS, draw_curves, read_metrics
from diffalign.report.grid import CELL, shown, write_grid
from diffalign.report.page import choose
from diffalign.report.preference_rate import GAIN

SCRIPT = "<script>alert(1)</script>"


def _folder(path: Path, shade: int, prompts: list[str], samples: int = 1, **settings: Any) -> Path:
    """Plain images in the layout of tools/generate.py."""
    (path / "images").mkdir(parents=True)
    rows = []
    for i, prompt in enumerate(prompts):
        for k in range(samples):
            image = f"images/{i:05d}_{k}.png"
            Image.new("RGB", (8, 8), (shade, i, k)).save(path / image)
            rows.append({"image": image, "prompt": prompt, "prompt_id": f"{i:05d}", "seed": 7, "sample": k})
    (path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "settings.json").write_text(json.dumps({"steps": 12, "versions": {"torch": "2.0"}, **settings}))
    return path


def _scorer(name: str, base: np.ndarray, aligned: np.ndarray, ids: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "unit": "points",
        **compare(base, aligned, ids, name=name, choice_temperature=1.0 if name == "judge" else None),
        "base_scores": base.tolist(),
        "aligned_scores": aligned.tolist(),
    }


def _comparison(
    root: Path, prompts: list[str], samples: int = 2, scorers: tuple[str, ...] = ("judge",)
) -> dict[str, Any]:
    """Arguments of write_report for two folders and random scores."""
    base = _folder(root / "base", 10, prompts, samples, lora=None)
    aligned = _folder(root / "aligned", 200, prompts, samples, lora="runs/x/export")
    pairs, rng = read_pairs(base, aligned), np.random.default_rng(0)
    ids = [pair.prompt_id for pair in pairs]
    results = [_scorer(name, rng.normal(size=len(ids)), rng.normal(0.5, size=len(ids)), ids) for name in scorers]
    keys = [{"prompt_id": p.prompt_id, "sample": p.sample, "prompt": p.prompt} for p in pairs]
    beside = {"base": 0.9, "aligned": 0.85, "change": -0.05, "change_low": -0.08, "change_high": 0.0}
    said = {"match": {**beside, "measured_by": f"match of {SCRIPT}"}, "diversity": None}
    return {"win_rates": {"scorers": results, "pairs": keys, **said}, "base_dir": base, "aligned_dir": aligned}


def _training_run(path: Path) -> Path:
    (path / "samples").mkdir(parents=True)
    lines = []
    for step in range(1, 41):
        row = {
            "step": step,
            "policy/loss": 1 / step,
            "policy/accuracy": 0.5 + step / 100,
            "policy/winner_error_change": -0.1,
        }
        row |= {f"policy/margin@t{t:03d}": step * t / 1e4 for t in (0, 250) if step % 2}
        lines.append(json.dumps(row))
    (path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 41, "policy/lo')
    (path / "config.yaml").write_text(f"trainer:\n  steps: 40\nnote: {SCRIPT}\n")
    for step in (0, 20, 40):
        Image.new("RGB", (30, 10), (step, 0, 0)).save(path / "samples" / f"step-{step:06d}.png")
    return path


class _Page(HTMLParser):
    """Collects the resources and scripts of a page, and its visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "xlink:href")]
        assert not any(k.startswith("on") for k, _ in attrs), attrs

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def test_text_from_data_is_never_markup(tmp_path: Path) -> None:
    """Scripts in prompts (and attributes), scorer names, titles and configs, and tags in metrics, are text."""
    arguments = _comparison(tmp_path, [SCRIPT, 'a "quoted" onload=alert(1) cat', "x"], scorers=(SCRIPT, "judge"))
    run = _training_run(tmp_path / "run")
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('{"step": 0, "<img onerror=alert(1) $x$>/loss": 1}\n' + metrics)
    index = write_report(tmp_path / "report", run_dir=run, title=SCRIPT, **arguments)
    text = index.read_text()
    page = _Page(text)
    assert "script" not in page.tags
    assert SCRIPT not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert page.text.count(SCRIPT) >= 3, "title, prompt and scorer are shown as they are"
    assert "<img onerror=alert(1) $x$>/loss" in page.text


def test_page_needs_no_network_and_every_file_it_names_is_there(tmp_path: Path) -> None:
    run = _training_run(tmp_path / "run")
    index = write_report(tmp_path / "report", run_dir=run, **_comparison(tmp_path, ["a", "b", "c"], samples=2))
    text = index.read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    sources = [s for s in _Page(text).sources if not s.startswith(("#", "data:"))]
    assert len(sources) == 1 + 2 * 6 + 2
    assert all((index.parent / s).is_file() and not s.startswith("/") for s in sources)
    assert not {"script", "iframe", "object", "embed"} & set(_Page(text).tags)


def test_gallery_has_every_pair_once_and_pairs_the_right_images(tmp_path: Path) -> None:
    arguments = _comparison(tmp_path, [f"prompt {i}" for i in range(10)], samples=2)
    index = write_report(tmp_path / "report", **arguments)
    text = index.read_text()
    for i in range(10):
        for k in range(2):
            assert text.count(f"id {i:05d} · sample {k} · seed 7") == 1
    articles = re.findall(r"<article.*?</article>", text, re.S)
    assert len(articles) == 20
    for article in articles:
        prompt = int(re.search(r"id (\d{5})", article).group(1))  # type: ignore[union-attr]
        sample = int(re.search(r"sample (\d)", article).group(1))  # type: ignore[union-attr]
        one, two = (Image.open(index.parent / src).getpixel((0, 0)) for src in re.findall(r' src="([^"]+)"', article))
        assert (one, two) == ((10, prompt, sample), (200, prompt, sample))
    order = json.loads((index.parent / "report.json").read_text())["shown"]
    scorer = arguments["win_rates"]["scorers"][0]
    difference = {
        (row["prompt_id"], row["sample"]): a - b
        for row, a, b in zip(
            arguments["win_rates"]["pairs"], scorer["aligned_scores"], scorer["base_scores"], strict=True
        )
    }
    assert [tuple(key) for key in order] == sorted(difference, key=lambda key: -difference[key])


def test_large_galleries_show_extremes_and_a_random_rest() -> None:
    differences = [float((i * 37) % 100) for i in range(100)]  # a permutation of 0..99
    (_, _, random), (_, _, best), (_, _, worst) = choose(differences)
    assert [differences[i] for i in best] == [99.0 - i for i in range(12)]
    assert [differences[i] for i in worst] == [0.0 + i for i in range(12)]
    assert len(random) == 24 and len({*random, *best, *worst}) == 48
    assert choose(differences) == choose(differences)
    ((_, _, everything),) = choose(differences[:48])
    assert sorted(everything) == list(range(48))


def test_table_and_json_hold_the_numbers(tmp_path: Path) -> None:
    arguments = _comparison(tmp_path, [f"p{i}" for i in range(60)], scorers=("one", "two"))
    index = write_report(tmp_path / "report", **arguments)
    text, numbers = index.read_text(), json.loads((index.parent / "report.json").read_text())
    for scorer in arguments["win_rates"]["scorers"]:
        for key in ("share_won", "direction"):
            assert f"{100 * scorer[key]:.1f} %" in text
            assert f"{100 * scorer[f'{key}_low']:.1f} \N{EN DASH} {100 * scorer[f'{key}_high']:.1f} %" in text
    first, second = sorted(s["p_value"] for s in numbers["scorers"])
    assert sorted(s["p_holm"] for s in numbers["scorers"]) == pytest.approx([min(2 * first, 1), max(2 * first, second)])
    assert len(numbers["pairs"]) == 120 and len(numbers["shown"]) == 48
    assert numbers["settings"]["aligned"]["lora"] == "runs/x/export"
    rows = re.findall(r"<tr class=\"differs\"><td>(\w+)</td>", text)
    assert rows == ["lora"], "the setting that differs is marked, the others are not"


def test_page_opens_with_the_grid_and_one_sentence(tmp_path: Path) -> None:
    """Followed by prompt match. A gain of 0.2 standard deviations is too small to see, for any preference."""
    arguments = _comparison(tmp_path, [f"p{i}" for i in range(30)])
    scorer = arguments["win_rates"]["scorers"][0]
    scorer |= {"gain_sd": 0.1}
    text = write_report(tmp_path / "report", **arguments).read_text()
    assert text.index("<h1>") < text.index('src="grid.png"') < text.index("A difference too small to see: people")
    assert text.index("too small to see") < text.index("Prompt match") < text.index("<article")
    assert "\N{MINUS SIGN}5.0 %" in text and "Diversity" not in text


def test_a_scorer_that_cannot_measure_is_said_to(tmp_path: Path) -> None:
    arguments = _comparison(tmp_path, ["a", "b"])
    arguments["win_rates"]["scorers"][0] |= dict.fromkeys(GAIN)
    text = write_report(tmp_path / "report", **arguments).read_text()
    assert "judge gives all images of the base the same score" in text and "not measurable" in text


def test_the_grid_shows_the_same_prompts_of_both_enlarged(tmp_path: Path) -> None:
    """16 of 30 prompts, two rows of eight: 8 pixels become 192; base above aligned; the same selection always."""
    arguments = _comparison(tmp_path, [f"p{i}" for i in range(30)])
    pairs = read_pairs(arguments["base_dir"], arguments["aligned_dir"])
    chosen = shown(pairs)
    assert len(chosen) == 16 == len({pair.prompt_id for pair in chosen}) and {pair.sample for pair in chosen} == {0}
    grid = (write_report(tmp_path / "report", **arguments).parent / "grid.png").read_bytes()
    write_report(tmp_path / "again", **arguments)
    assert (tmp_path / "again" / "grid.png").read_bytes() == grid
    with Image.open(tmp_path / "report" / "grid.png") as image:
        colours = image.getcolors(image.width * image.height)
        assert colours is not None
        count = {colour: n for n, colour in colours}
        top, below = (image.crop((0, y, image.width, y + 1)).getcolors(9999) for y in (100, 100 + CELL))
    for pair in chosen:
        for shade in (10, 200):
            assert count[(shade, int(pair.prompt_id), 0)] == CELL * CELL
    assert {c[0] for _, c in top or []} >= {10} and not {200} & {c[0] for _, c in top or []}
    assert {c[0] for _, c in below or []} >= {200} and not {10} & {c[0] for _, c in below or []}


def test_curves_draw_what_the_run_has(tmp_path: Path) -> None:
    metrics = read_metrics(_training_run(tmp_path / "run") / "metrics.jsonl")
    assert metrics["policy/loss"] == (list(range(1, 41)), pytest.approx([1 / s for s in range(1, 41)]))
    assert metrics["policy/margin@t250"][0] == list(range(1, 41, 2)), "absent values are left out"
    drawn = dict(draw_curves(metrics))
    assert list(drawn) == ["Loss", "Implicit accuracy", "Error minus the reference's", "Margin by timestep"]
    assert "policy/margin@t000" in drawn["Margin by timestep"] and "policy/margin@t250" in drawn["Margin by timestep"]
    assert "currentColor" in drawn["Loss"] and drawn == dict(draw_curves(metrics)), "the same run draws the same page"


def test_long_curves_are_shortened_to_means(tmp_path: Path) -> None:
    """900 steps become 300 means of three: the first, of 1, 2, 3, is 2 at step 3."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {s}, "policy/loss": {s}}}\n' for s in range(1, 901)))
    steps, values = read_metrics(path)["policy/loss"]
    assert (len(steps), steps[0], values[0], steps[-1], values[-1]) == (POINTS, 3, 2.0, 900, 899.0)


def test_folders_that_do_not_match_are_refused(tmp_path: Path) -> None:
    base = _folder(tmp_path / "base", 0, ["a", "b"])
    with pytest.raises(ValueError, match=r"1 of 2 images of .*base' have no partner in .*short'.*'00001', sample 0"):
        read_pairs(base, _folder(tmp_path / "short", 0, ["a"]))
    with pytest.raises(ValueError, match=r"2 of 4 images of .*many' have no partner in .*base'"):
        read_pairs(base, _folder(tmp_path / "many", 0, ["a", "b"], samples=2))
    with pytest.raises(ValueError, match=r"prompt of prompt_id '00001'.*'b'.*'c'"):
        read_pairs(base, _folder(tmp_path / "other", 0, ["a", "c"]))
    reseeded = _folder(tmp_path / "reseeded", 0, ["a", "b"])
    manifest = reseeded / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"seed": 7', '"seed": 8'))
    with pytest.raises(ValueError, match="seed of prompt_id '00000'"):
        read_pairs(base, reseeded)
    manifest.write_text(manifest.read_text() * 2)
    with pytest.raises(ValueError, match="line 3: prompt_id '00000', sample 0 is listed twice"):
        read_manifest(reseeded)
    manifest.write_text('{"image": "x.png", "prompt": "a"}\n')
    with pytest.raises(ValueError, match="line 1 has no prompt_id, sample"):
        read_manifest(reseeded)
    with pytest.raises(FileNotFoundError, match="diffalign generate"):
        read_manifest(tmp_path / "nothing")


def test_win_rates_of_other_folders_are_refused(tmp_path: Path) -> None:
    arguments = _comparison(tmp_path, ["a", "b", "c"])
    arguments["win_rates"]["pairs"].pop()
    with pytest.raises(ValueError, match="belong to 5 other pairs than the 6"):
        write_report(tmp_path / "report", **arguments)
    arguments["win_rates"]["scorers"][0].pop("people_prefer")
    with pytest.raises(ValueError, match="earlier version"):
        write_report(tmp_path / "report", **arguments)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "line, message",
    [
        ({"image": "../secret.png"}, "line 2: image '../secret.png' leads out of the folder"),
        ({"image": "/etc/passwd"}, "line 2: image '/etc/passwd' leads out"),
        ({"image": "a/../../x.png"}, "line 2: image 'a/../../x.png' leads out"),
        ({"image": "a\0.png"}, "line 2: image and prompt must be text"),
        ({"prompt": ["a"]}, "line 2: image and prompt must be text"),
        ({"prompt_id": [1]}, "line 2: prompt_id must be"),
        ("{", "line 2 is not JSON: Expecting property name"),
        ("[" * 20_000, "line 2 is not readable JSON: nested too deeply"),
        ("[1]", "line 2 has no image, prompt, prompt_id, sample"),
    ],
)
def test_a_manifest_leads_nowhere_else_and_its_bad_lines_are_named(tmp_path: Path, line: Any, message: str) -> None:
    fine = {"image": "0.png", "prompt": "a", "prompt_id": "0", "sample": 0}
    bad = line if isinstance(line, str) else json.dumps({**fine, "sample": 1, **line})
    (tmp_path / "manifest.jsonl").write_text("\ufeff" + json.dumps(fine) + "\n" + bad + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_manifest(tmp_path)


def test_a_grid_of_wide_images_has_no_empty_half(tmp_path: Path) -> None:
    """Rows are as high as the images: 48 x 24 pixels are enlarged four times to 192 x 96."""
    file = tmp_path / "a.png"
    Image.new("RGB", (48, 24)).save(file)
    write_grid([Pair(str(i), 0, "fox", 0, file, file) for i in range(2)], tmp_path / "grid.png")
    width, height = Image.open(tmp_path / "grid.png").size
    assert (width, height) == (72 + 2 * (192 + 6), 26 + 2 * (96 + 6) + 6)
