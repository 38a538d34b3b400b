"""The scripts and walks of examples/, and the guide to own pairs, run and give the documented results."""

from __future__ import annotations

import csv
import json
import re
import runpy
import shlex
import shutil
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffalign.commands import cli as diffalign
from diffalign.data import read_records
from diffalign.people.choice_file import ChoiceLog
from reward_models import load_scorer
from reward_models.folder import cli

EXAMPLES = Path(__file__).parent.parent / "examples"
SCORER = "custom_scorer:Colourfulness"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TINY = ["trainer.steps=1", "trainer.grad_accum=1", "data.batch_size=2", "data.resolution=32", "data.num_workers=0"]
TINY += ["backbone.lora_rank=2", "hooks.sample_steps=2", "run.mixed_precision=no", "backbone.dtype=fp32"]
TINY += ["hooks.verify_export=false", "data.limit=4"]
SHORT = ["trainer.steps=1", "hooks.checkpoint_every=0"]


def example(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_every_example_is_tried_here() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {"align", "score", "custom_scorer"}
    assert {file.stem for file in EXAMPLES.glob("*.sh")} == {"align_own_pairs", "best_of_n", "personalise"}


def test_align_from_python(tmp_path: Path) -> None:
    example("align")["align"](str(tmp_path), steps=2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["policy/loss"] == pytest.approx(0.693147, abs=1e-5)  # policy equals reference: ln 2
    (weights,) = (tmp_path / "export").glob("pytorch*.safetensors")
    assert any(tensor.any() for name, tensor in load_file(weights).items() if "lora_B" in name)


def test_score_from_python(pairs_file: Path) -> None:
    """Each score equals that of the image alone; the largest comes first."""
    prompt = "large red circle on white"
    ranked = example("score")["rank"](str(pairs_file.parent), prompt)
    assert len(ranked) == 48 and [score for score, _ in ranked] == sorted((s for s, _ in ranked), reverse=True)
    best, file = ranked[0]
    assert load_scorer("playground_hps").score_images([file], [prompt]).item() == pytest.approx(best, abs=1e-4)


@pytest.fixture
def custom(monkeypatch: pytest.MonkeyPatch) -> str:
    """Spec of the example's scorer, with its folder on PYTHONPATH."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return SCORER


def test_custom_scorer_by_hand(custom: str) -> None:
    """Half red, half green: rg = +-1 and yb = 1/2, so the variances are 1 and 0, the means 0 and 1/2: 1 + 0.3 / 2.

    Grey has neither, and its gradient is finite.
    """
    image = torch.zeros(2, 3, 4, 4)
    image[0, 0, :, :2] = image[0, 1, :, 2:] = 1
    image[1] = 0.5
    image.requires_grad_()
    scores = load_scorer(custom).score(image, ["", ""])
    assert torch.allclose(scores, torch.tensor([1.15, 0.0]), atol=1e-5)
    scores.sum().backward()
    assert image.grad is not None and image.grad.isfinite().all() and image.grad[0].any()
    half = load_scorer(f"{custom},mean_weight=0.5").score(image.detach(), ["", ""])
    assert half[0] == pytest.approx(1.25, abs=1e-5)


def test_custom_scorer_scores_a_folder(custom: str, pairs_file: Path, tmp_path: Path) -> None:
    folder, out = str(pairs_file.parent), tmp_path / "scores.csv"
    assert cli.main([folder, "--prompt", "", "--scorer", custom, "--out", str(out)]) == 0
    scores = [float(row[custom]) for row in csv.DictReader(out.open())]
    assert len(scores) == 48 and min(scores) > 0


def test_custom_scorer_is_the_reward_of_a_recipe(custom: str, recipe: Callable, tmp_path: Path) -> None:
    tiny = ["data.limit=4", "data.batch_size=4", "trainer.steps=2", "monitor.prompt_count=2", "hooks.sample_every=0"]
    tiny += ["hooks.verify_export=false", f"reward.scorers=[{custom}]", f"run.folder={tmp_path}"]
    recipe("refl", "--config", "playground", *tiny)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] > 0]  # the monitor measures before the first step
    assert len(steps) == 2 and all(row["policy/reward"] > 0 < row["policy/reward_gradient"] for row in steps)


# The walks and the guide. The page in the browser is left out (test_choose.py): the first image of each pair is chosen.


def commands(text: str) -> list[list[str]]:
    """The commands of a shell script, with its variables filled in."""
    variables: dict[str, str] = {}
    found = []
    for line in filter(None, text.splitlines()):
        if named := re.fullmatch(r"([A-Z]\w*)=(\S+)", line):
            variables[named[1]] = named[2]
        elif not line.startswith("#") and line != "set -e":
            found.append(shlex.split(string.Template(line).substitute(variables)))
    return found


def choose_first(words: list[str]) -> None:
    """`diffalign user choose` with a person who likes the first image of every pair."""
    user = runpy.run_path(str(EXAMPLES.parent / "tools" / "user.py"))
    args, args.rest = user["_parser"]().parse_known_args(words[2:])
    choices = ChoiceLog(args.out / "choices.jsonl", user["_pairs"](args))
    for pair in list(choices.pairs):
        choices.choose(pair.id, 0)


def run(words: list[str], tiny_sd: Path) -> None:
    """Run one command in this process, with small inputs and the tiny model and the playground's scorer."""
    words = [{SD15: str(tiny_sd), "pickscore": "playground_hps"}.get(word, word) for word in words]
    if words[:2] == ["diffalign", "train"]:
        own = "playground" not in words
        words += [*TINY, f"backbone.path={tiny_sd}"] if own else SHORT
        words += {
            "draft": ["hooks.verify_export=false", "monitor.prompt_count=2", "data.limit=2", "data.batch_size=2"]
        }.get(words[2], [])
        words += {"personal_reward": ["choices.batch_size=8", "hooks.shots=[4]"]}.get(words[2], [])
        words += ["choices.strangers=0.4"] if words[2] == "personal_reward" else []
    if "--pipeline" in words:
        words += ["--steps", "2", "--size", "32"]
    words += ["--people=12", "--prompts=120", "--opinions=2"] if "people" in words else []
    words = ["4" if word == "64" else word for word in words]
    if words[:3] == ["diffalign", "user", "choose"]:
        return choose_first(words)
    assert (diffalign if words[0] == "diffalign" else cli).main(words[1:]) == 0, words


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list) -> Path:
    """A folder with the prompts that the walks read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("red circle on white\nblue square on black\nred square on pink\n")
    (tmp_path / "held_out.txt").write_text("green circle on white\nblue cross on black\n")
    return tmp_path


@pytest.mark.parametrize(
    ("walk", "made"),
    [
        (
            "align_own_pairs",
            ["mine/choices.jsonl", "win_rate.json", "mine/aligned/export/win_rate.json", "report/grid.png"],
        ),
        ("best_of_n", ["best.csv", "scores.html", "ranked.jsonl"]),
        ("personalise", ["me.safetensors", "mine.csv", "best.csv", "for_me/manifest.jsonl"]),
    ],
)
def test_a_walk_runs_from_its_first_to_its_last_line(walk: str, made: list[str], here: Path, tiny_sd: Path) -> None:
    for words in commands((EXAMPLES / f"{walk}.sh").read_text()):
        run(words, tiny_sd)
    for name in made:
        assert (here / name).stat().st_size > 0, name


def test_every_command_of_the_guide_to_own_pairs_runs(
    here: Path, tiny_sd: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for folder, captions in (("portraits", None), ("photos", ["red circle on white"] * 3)):
        (here / folder).mkdir()
        for k in range(3):
            shutil.copy(pairs_file.parent / f"chosen{k}.png", here / folder)
            if captions:
                (here / folder / f"chosen{k}.txt").write_text(captions[k])
    row = {
        "prompt": "red circle on white",
        **{k: (pairs_file.parent / f"{k}0.png").read_bytes() for k in ("chosen", "rejected")},
    }
    table = pa.Table.from_pylist([row] * 4)
    (here / "saved_pairs").mkdir()
    (here / "owner" / "pairs").mkdir(parents=True)  # as after a download; test_tables.py downloads
    pq.write_table(table, here / "owner" / "pairs" / "train.parquet")
    with (
        pa.OSFile(str(here / "saved_pairs" / "data.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    (here / "saved_pairs" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    page = (EXAMPLES.parent / "docs" / "own_pairs.md").read_text()
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        for words in commands(block):
            run(words, tiny_sd)
    assert len([*read_records(here / "portraits_chosen")]) == 3 == len([*read_records(here / "photos_chosen")])
    for name in ("mine", "photos", "from_hub", "from_disk"):
        assert (here / "runs" / name / "export" / "README.md").exists()
    with Image.open(next((here / "like_photos" / "images").iterdir())) as image:
        assert image.size == (32, 32)
