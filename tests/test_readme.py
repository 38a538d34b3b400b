"""Every command of the README runs, with tiny inputs where the real ones need a download or a GPU."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from diffalign.commands import cli, launch
from reward_models.folder import cli as score_cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CI = (
    "pip install -e .",
    'pip install -e ".[test,optimizers,quantization,ray]"',
    "pytest",
    "pytest -m learning",
    "diffalign demo",
)
TINY = ["trainer.steps=2", "trainer.grad_accum=1", "data.batch_size=2", "data.resolution=32", "data.num_workers=0"]
TINY += ["data.limit=8", "hooks.verify_export=false"]  # exports are verified in test_export.py
TINY += ["backbone.lora_rank=2", "hooks.sample_steps=2", "run.mixed_precision=no", "backbone.dtype=fp32"]
SCORER = """
import torch
class Sharpness:
    differentiable, unit = True, "grey levels"
    def score(self, images, prompts):
        return images.diff(dim=-1).abs().mean((1, 2, 3))
"""


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and line not in CI]


def test_installing_testing_and_the_demo_are_what_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for command in CI[1:4]:
        assert command.replace("pip install", "pip install -q") in script or command in script
    assert "test_demo" in (ROOT / "tests" / "test_learning.py").read_text()


@pytest.fixture
def here(tmp_path: Path, pairs_file: Path, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the README assumes."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pairs_file.parent, tmp_path, dirs_exist_ok=True)
    shutil.copytree(pairs_file.parent, tmp_path / "pickapic_v2")
    shutil.copytree(tiny_sd, tmp_path / "models" / "my-sd15")
    (tmp_path / "photos").mkdir()
    for k in range(3):
        shutil.copy(pairs_file.parent / f"chosen{k}.png", tmp_path / "photos")
    (tmp_path / "prompts.txt").write_text("red circle on white\nblue square on black\n")
    (tmp_path / "my_scorers.py").write_text(SCORER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return tmp_path


def tiny_clip(folder: Path) -> str:
    """A random open_clip model in a folder, as `--scorer clip,model=local-dir:...` reads it."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    model = open_clip.CLIP(**config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"clip,model=local-dir:{folder}"


def run(words: list[str], recipe: Callable) -> int:
    """One README command in this process."""
    if words[0] == "accelerate":
        words = words[2:]
        if words[0] == "--config_file":
            assert load_config_from_file(str(ROOT / words[1])).num_processes == 8
            words = words[2:]
        assert (ROOT / words[0]).exists()
        return recipe(Path(words[0]).stem, *words[1:]) or 0
    if words[:2] == ["diffalign", "train"]:
        return recipe(launch.find("train", words[2]).stem, *words[3:]) or 0
    if words[:2] == ["diffalign", "eval"]:
        return runpy.run_path(str(launch.find("eval", words[2])))["main"](words[3:])
    if words[:2] == ["diffalign", "generate"]:
        return runpy.run_path(str(launch.find("tools", words[1])))["main"](words[2:])
    if words[0] == "reward-score":
        return score_cli.main(words[1:])
    return cli.main(words[1:])


@pytest.mark.usefixtures("started")
def test_every_command_runs(here: Path, recipe: Callable) -> None:
    clip = tiny_clip(here / "clip")
    sd15 = str(here / "models" / "my-sd15")
    seen = set()
    for line in commands():
        words = shlex.split(line)
        words = [clip if w == "clip" else sd15 if w == SD15 else w for w in words]
        if "train/diffusion_dpo.py" in line or "diffalign train" in line:
            words += TINY
            if "run.resume=true" in words:
                words.append("trainer.steps=3")
            elif "backbone.path=models/my-sd15" in words:
                shutil.rmtree("runs/fox")
            elif "playground" not in words:
                words.append(f"backbone.path={sd15}")
        if "generate" in words:
            words += ["--steps", "2", "--size", "32"]
        assert run(words, recipe) == 0, line
        seen.add(words[0])
    assert seen == {"accelerate", "diffalign", "reward-score"}
    for made in ("runs/fox/export", "runs/first/export", "win_rate.json", "report/index.html", "scores.csv"):
        assert (here / made).exists(), made
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL)).replace(SD15, sd15)
    code = code.replace('in the snow")', 'in the snow", num_inference_steps=2, height=32, width=32)')
    made = {}
    exec(code, made)
    assert made["image"].size == (32, 32)


def test_every_link_leads_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), (page.name, link)


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = "diffalign|reward_models|train|eval|tests|configs|benchmarks|examples|docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_is_there(page: Path) -> None:
    """Own files, folders and modules; `<name>` and capitals are placeholders."""
    text = page.read_text()
    paths = set(re.findall(rf"(?<![\w./-])((?:{OURS})/[\w./-]*[\w/])(?![\w<*])", text))
    assert not [path for path in paths if not re.search("[A-Z]{3}", path) and not (ROOT / path).exists()]
    for module in re.findall(r"\b(?:diffalign|reward_models)(?:\.[a-z_]+)+", text):
        steps = module.split(".")
        found = [ROOT.joinpath(*steps[:k]) for k in range(2, len(steps) + 1)]
        assert any(path.is_dir() or path.with_suffix(".py").exists() for path in found), module


def test_the_index_leads_to_every_page() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs" / "index.md").read_text())
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= set(links)
    assert {f"../examples/{file.name}" for file in (ROOT / "examples").glob("*.py")} <= set(links)
