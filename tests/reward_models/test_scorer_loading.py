"""load_scorer: names, settings and their types, classes of the user's own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from reward_models import load_scorer

SCORERS = """
    from typing import Literal
    from torch import nn

    class Plain:
        differentiable, unit = False, "points"
        def __init__(self, *, n: int = 1, x: float | None = 0.5, on: bool = False,
                     how: Literal["a", "b"] = "a", name: str = "", table: dict | None = None):
            self.given = (n, x, on, how, name)
        def score(self, images, prompts):
            return images.mean((1, 2, 3))

    class Net(nn.Module):
        differentiable, unit = True, "raw"
        def __init__(self):
            super().__init__()
            self.layer = nn.Dropout()
            self.linear = nn.Linear(1, 1)
        def score(self, images, prompts):
            return images.mean((1, 2, 3))

    class Half:
        unit = "raw"
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loading_scorers.py").write_text(textwrap.dedent(SCORERS))
    (tmp_path / "loading_broken.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)


def test_settings_get_the_types_of_the_constructor() -> None:
    scorer: Any = load_scorer("loading_scorers:Plain")
    assert scorer.given == (1, 0.5, False, "a", "")
    scorer = load_scorer("loading_scorers:Plain,n=3,x=2,on=true,how=b,name=a=b", "cpu")
    assert scorer.given == (3, 2.0, True, "b", "a=b")
    scorer = load_scorer("loading_scorers:Plain,x=none,name=")
    assert scorer.given == (1, None, False, "a", "")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("clpi", "no scorer 'clpi', did you mean 'clip'?; known: clip, or your own package.module:Class"),
        ("clip,modle=x", "scorer 'clip,modle=x': no setting 'modle', did you mean 'model'?; known: model, pretrained"),
        ("clip,weight=two", "scorer 'clip,weight=two': 'weight' must be float; got 'two'"),
        ("clip,weight", "no setting 'weight'"),
        ("loading_scorers:Plain,n=1.5", "'n' must be int; got '1.5'"),
        ("loading_scorers:Plain,on=yes", "'on' must be one of true, false; got 'yes'"),
        ("loading_scorers:Plain,how=c", "'how' must be one of a, b; got 'c'"),
        ("loading_scorers:Plain,table=x", "'table' can be set from Python only"),
        ("loading_scorers:Net,n=1", "no setting 'n'; this scorer takes none"),
        ("loading_scorers:Plian", "'loading_scorers' has no Plian, did you mean 'Plain'?"),
        ("loading_scorers:Half", "'loading_scorers:Half' is no scorer: it has no attribute differentiable, score"),
        ("no_such_module:Scorer", "no module 'no_such_module'; is its folder on PYTHONPATH?"),
    ],
)
def test_mistakes_name_what_is_known(spec: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_scorer(spec)
    assert message in str(error.value)


def test_devices_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"--device must be auto, cpu, cuda, cuda:1, \.\.\.; got 'gpu'"):
        load_scorer("loading_scorers:Plain", "gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda asks for a GPU"):
            load_scorer("loading_scorers:Plain", "cuda")


def test_a_module_that_lacks_a_library_says_which() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        load_scorer("loading_broken:Scorer")


def test_networks_come_frozen() -> None:
    scorer: Any = load_scorer("loading_scorers:Net", "cpu")
    assert not scorer.layer.training and not scorer.linear.weight.requires_grad


def test_the_playground_judge_is_a_scorer() -> None:
    assert load_scorer("diffalign.playground:Judge").differentiable is False


def test_importing_the_package_and_asking_for_help_load_no_torch() -> None:
    code = (
        "import sys, reward_models, reward_models.cli\n"
        "try: reward_models.cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'open_clip', 'transformers', 'diffusers', 'diffalign'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "reward-score images" in done.stdout and "clip" in done.stdout
