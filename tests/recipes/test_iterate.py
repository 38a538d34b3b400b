"""`diffalign iterate`: rounds of generation, labelling, training and evaluation, killed and resumed."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffalign.commands import cli, launch
from diffalign.playground.world import captions
from diffalign.report.rounds import best_round, parting

TRAIN = ["trainer.steps=2", "data.batch_size=2", "data.num_workers=0", "backbone.lora_rank=2", "hooks.sample_every=0"]
TRAIN += ["hooks.verify_export=false", "hooks.checkpoint_every=1", "data.cache=off", "data.draws_per_sample=null"]
CONFIG: dict[str, Any] = {
    "loop": {"folder": "loop", "rounds": 2, "patience": 2, "fresh": "first", "fresh_share": 0.5},
    "model": {"path": "playground", "options": "--steps 1 --guidance 1 --device cpu"},
    "generate": {"prompts": "prompts.txt", "samples_per_prompt": 2},
    "synthesize": {"scorers": ["simulated:Brightness"]},
    "train": {"recipe": "diffusion_dpo", "config": "playground", "options": " ".join(TRAIN)},
    "evaluate": {"prompts": "prompts.txt", "scorers": ["diffalign.playground:Judge", "simulated:Brightness"]},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(captions(2, held_out=True)) + "\n")
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


ROUND = ["generate", "synthesize", "diffusion_dpo", "generate", "win_rate"]


def test_two_rounds_and_a_kill_in_each_kind_of_stage(
    here: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second round is killed after its training made a checkpoint, and again before its evaluation."""
    start = launch.start

    def killed(recipe: Path, words: Sequence[str], **how: Any) -> int:
        if recipe.stem == "win_rate" and "loop/round-2/held_out" in words:
            return 143
        code = start(recipe, words, **how)
        if recipe.stem == "diffusion_dpo" and "run.folder=loop/round-2/run" in words and "run.resume=true" not in words:
            shutil.rmtree("loop/round-2/run/export")
            return 137
        return code

    monkeypatch.setattr(launch, "start", killed)
    assert cli.main(["iterate", "loop.yaml"]) == 137
    assert "round 2, training failed; run the same command again" in capsys.readouterr().err
    assert [call[0] for call in started] == ["iterate", "generate", *ROUND, *ROUND[:3]]
    first, second = (call for call in started if call[0] == "diffusion_dpo")
    assert not [word for word in first if word.startswith("backbone.lora=")] and "run.seed=1" in first
    assert "backbone.lora=[loop/round-1/run/export]" in second and "run.seed=2" in second
    assert started[7][started[7].index("--lora") + 1] == "loop/round-1/run/export"
    started.clear()
    assert cli.main(["iterate", "loop.yaml"]) == 143
    assert [call[0] for call in started] == ["iterate", "diffusion_dpo", "generate"]
    assert "run.resume=true" in started[1] and started[2].count("--lora") == 2
    started.clear()
    monkeypatch.setattr(launch, "start", start)
    assert cli.main(["iterate", "loop.yaml"]) == 0
    assert [call[0] for call in started] == ["iterate", "win_rate"]
    _reported(here / "loop")
    started.clear()
    assert cli.main(["iterate", "loop.yaml", "loop.rounds=1"]) == 0 and [call[0] for call in started] == ["iterate"]
    assert cli.main(["iterate", "loop.yaml", "loop.seed=3"]) == 2
    assert "'loop' holds a loop with another loop.seed; choose another loop.folder" in capsys.readouterr().err


def _reported(loop: Path) -> None:
    """Both rounds with both judges; the second was trained on its two pairs and two of the first round, in place."""
    found = json.loads((loop / "report/rounds.json").read_text())
    assert [one["round"] for one in found["rounds"]] == [1, 2] and [one["pairs"] for one in found["rounds"]] == [2, 4]
    assert [judge["name"] for judge in found["rounds"][1]["judges"]] == CONFIG["evaluate"]["scorers"]
    lines = [json.loads(line) for line in (loop / "round-2/data.jsonl").read_text().splitlines()]
    assert [Path(line["chosen"]).parts[:2] for line in lines] == [("images", "images")] * 2 + [("..", "round-1")] * 2
    assert all((loop / "round-2" / line[side]).exists() for line in lines for side in ("chosen", "rejected"))
    page = (loop / "report/index.html").read_text()
    assert page.count("<h2>Round") == 2 and "grid-2.png" in page and (loop / "report/grid-2.png").exists()
    assert "Best round by diffalign" in (loop / "report/rounds.md").read_text()


def test_the_reference_stays_the_base_and_the_loop_stops(
    here: Path, monkeypatch: pytest.MonkeyPatch, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands are imitated: the judge says +0.5, then +0.3. The second LoRA starts from the first one."""
    gains, start, words_of = iter([0.5, 0.3]), launch.start, dict[str, list[list[str]]]()

    def imitated(recipe: Path, words: Sequence[str], **how: Any) -> int:
        if recipe.stem == "iterate":
            return start(recipe, words, **how)
        words_of.setdefault(recipe.stem, []).append([*words])
        if recipe.stem == "win_rate":
            return _say(Path(words[words.index("--out") + 1]), next(gains))
        if recipe.stem == "diffusion_dpo":
            folder = next(word.partition("=")[2] for word in words if word.startswith("run.folder="))
            (Path(folder) / "export").mkdir(parents=True)
            return 0
        out = Path(words[words.index("--out") + 1])
        out.parent.mkdir(parents=True, exist_ok=True)
        if recipe.stem == "synthesize":
            out.write_text('{"prompt": "a", "chosen": "a.png", "rejected": "b.png"}\n')
        else:
            shutil.copytree(_images(here), out)
        return 0

    monkeypatch.setattr(launch, "start", imitated)
    words = ["loop.rounds=5", "loop.patience=1", "loop.reference=base", "loop.fresh=null", "loop.fresh_share=0"]
    assert cli.main(["iterate", "loop.yaml", *words]) == 0
    assert "Stopped after round 2: the held-out judge has not risen since round 1." in capsys.readouterr().out
    assert len(words_of["diffusion_dpo"]) == 2
    assert "backbone.lora_start=loop/round-1/run/export" in words_of["diffusion_dpo"][1]
    assert [call[call.index("--seed") + 1] for call in words_of["generate"]] == ["0", "1", "0", "2", "0"]
    assert words_of["generate"][4][2:4] == ["--lora", "loop/round-2/run/export"]  # that alone


def _images(here: Path) -> Path:
    import painted

    made = here / "painted"
    return made if made.exists() else painted.folder(made, [(1, 0), (0.5, 0)], captions(2, held_out=True))


def _say(file: Path, gain: float) -> int:
    shares = {"share_won": 0.6, "share_won_low": 0.5, "share_won_high": 0.7}
    judge = {"name": "a", "gain_sd": gain, "gain_sd_low": gain - 0.1, "gain_sd_high": gain + 0.1, **shares}
    file.write_text(json.dumps({"scorers": [judge], "match": None, "diversity": None}))
    return 0


def test_the_report_says_where_the_judges_part() -> None:
    def rounds(*gains: tuple[float, float]) -> list[dict[str, Any]]:
        names = ("held out", "learned")
        judges = [[{"name": n, "gain_sd": x} for n, x in zip(names, both, strict=True)] for both in gains]
        return [{"round": k, "judges": both} for k, both in enumerate(judges, 1)]

    found = rounds((0.2, 0.5), (0.6, 0.9), (0.4, 1.1), (0.1, 1.3))
    (said,) = parting(found)
    assert said.startswith("In round 3, learned and held out part: the gain by the former rises from +0.90 to +1.10")
    assert best_round(found)["round"] == 2 and parting(rounds((0.2, 0.5), (0.1, 0.4))) == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["loop.round=2"], "unknown key 'loop.round'; did you mean 'loop.rounds'?"),
        (["loop.fresh=null"], "'loop.fresh' and 'loop.fresh_share' in (0, 1) belong together"),
        (["loop.fresh=none.jsonl"], "'loop.fresh': 'none.jsonl' does not exist"),
        (["loop.fresh=pairs.parquet"], "'loop.fresh' = pairs.parquet must be a .jsonl file or first"),
        (["generate.prompts=none.txt"], "'none.txt' does not exist"),
        (["train.recipe=dpo"], "no train recipe 'dpo'; known: "),
        (["evaluate.scorers=['simulated:Brightness']"], "it must label nothing"),
        (["synthesize.select=best"], "'synthesize.select' must be"),
    ],
)
@pytest.mark.usefixtures("here", "started")
def test_settings_are_checked_before_the_first_command(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["iterate", "loop.yaml", *words]) == 2
    assert complaint in capsys.readouterr().err and not Path("loop").exists()


@pytest.mark.usefixtures("started")
def test_a_config_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["iterate", "playgrund"]) == 2
    assert "give a .yaml file or the name of a shipped one (playground)" in capsys.readouterr().err


def test_the_benchmark_compares_the_last_rounds_of_the_same_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds of `once` stand 0.1 and 0.3 below the last of two rounds: 0.2, and t(1) 12.706 x 0.1 half."""
    monkeypatch.syspath_prepend(launch.ROOT / "benchmarks")
    found = runpy.run_path(str(launch.ROOT / "benchmarks" / "iterate.py"))
    gains = {("rounds", 2): 1.0, ("rounds", 1): 9.0, ("once", 1): 0.8}
    rows = [
        {"arm": arm, "seed": seed, "round": number, "exact": gain - seed, "learned": gain}
        for (arm, number), gain in gains.items()
        for seed in (0, 1)
    ]
    for row in rows:
        row["exact"] += (0.1, -0.1)[row["seed"]] * (row["arm"] == "once")
    first, second = found["difference"]([*rows, {**rows[-1], "seed": 2}]).splitlines()
    assert first == "0 seeds of rounds and fixed; an interval needs two"
    assert second.startswith("rounds minus once, standard deviations, 2 seeds: exact judge: +0.20 [-1.07, +1.47]; ")
    assert second.endswith("learned judge: +0.20 [+0.20, +0.20]")
