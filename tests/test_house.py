"""The layout of the house: import rules, packaging, budgets, names."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARIES_ONLY: set[str] = set()
MAY_IMPORT = {
    "types": LIBRARIES_ONLY,
    "draws": {"types"},
    "schedule": {"types", "draws"},
    "sampling": {"types", "draws", "schedule"},
    "losses": {"types", "draws", "schedule"},
    "noising": {"types", "draws", "schedule", "sampling", "losses"},
    "inversion": {"types", "draws", "schedule", "sampling"},
    "placement": LIBRARIES_ONLY,
    "lora": {"types", "draws"},
    "ema": {"types"},
    "user_adapter": {"types", "draws"},
    "reference": {"types", "draws", "schedule", "lora", "placement"},
    "playground": {"types", "draws", "playground"},
    "report": {"types", "draws", "report"},
}
MAY_IMPORT["backbones"] = {*MAY_IMPORT} - {"report"} | {"backbones"}
MAY_IMPORT["data"] = {"types", "draws", "schedule", "playground", "data"}
MAY_IMPORT["sampler"] = {*MAY_IMPORT} - {"report", "data"}
MAY_IMPORT["divergence"] = {"types", "draws", "schedule"}
MAY_IMPORT["rewards"] = {"types", "draws", "schedule"}
MAY_IMPORT["algorithms"] = {*MAY_IMPORT} - {"report"} | {"algorithms"}
"""What a module or folder of diffalign/ may import of diffalign. The rest stands above all of them."""


def _imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{a.name}" for a in node.names} if node.module == "diffalign" else {node.module}
    return names


def _python(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_core_modules_import_only_what_stands_below_them(part: str) -> None:
    files = _python(f"diffalign/{part}") or [ROOT / "diffalign" / f"{part}.py"]
    for file in files:
        inside = {name.split(".")[1] for name in _imports(file) if name.startswith("diffalign.")}
        assert inside <= MAY_IMPORT[part], f"{file.relative_to(ROOT)} imports {inside - MAY_IMPORT[part]}"


SHARED_ROOMS = {"reward_models.files", "reward_models.hub", "reward_models.images"}
"""What diffalign may import of reward_models: text, atomic writing, decoding, the hub; no network."""


def test_packages_do_not_import_each_other_nor_recipes() -> None:
    for file in _python("reward_models"):
        assert not {n for n in _imports(file) if n.split(".")[0] in ("diffalign", "diffusers")}, file
    for file in _python("diffalign"):
        assert (
            not {n for n in _imports(file) if n.split(".")[0] in ("reward_models", "train", "eval")} - SHARED_ROOMS
        ), file
    for room in SHARED_ROOMS:
        inside = {n for n in _imports(ROOT / f"{room.replace('.', '/')}.py") if n.split(".")[0] == "reward_models"}
        assert inside <= SHARED_ROOMS, f"{room} imports {inside}: it must stay light"


def test_setup_cfg_lists_the_packages_on_disk() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    on_disk = {
        ".".join(p.parent.relative_to(ROOT).parts)
        for name in ("diffalign", "reward_models")
        for p in (ROOT / name).rglob("__init__.py")
    }
    assert listed == on_disk | {"diffalign.train", "diffalign.eval", "diffalign.configs"}


def test_recipes_shadow_no_module() -> None:
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    for file in _python("train") + _python("eval"):
        assert file.stem not in taken, file
        assert not (file.parent / "__init__.py").exists()


def test_file_budget() -> None:
    long = {
        str(f.relative_to(ROOT)): n
        for f in _python("diffalign") + _python("reward_models") + _python("train") + _python("eval")
        if (n := len(f.read_text().splitlines())) > 300
    }
    assert not long


SHARED = {
    "hps": "reward_training",
    "vp_score": "reward_training",
    "distill": "diff_instruct_star",
    "pso_offline": "pso",
    "pso_customize": "pso",
}
"""Recipes that use the algorithm of another one."""


TESTED_TOGETHER = dict.fromkeys(("refl", "draft", "r0"), "reward_gradient")


def test_recipe_has_config_and_test_of_the_same_name() -> None:
    for recipe in _python("train"):
        algorithm = SHARED.get(recipe.stem, recipe.stem)
        assert (ROOT / "configs" / recipe.stem / "playground.yaml").exists()
        assert (ROOT / "diffalign" / "algorithms" / f"{algorithm}.py").exists()
        assert (ROOT / "tests" / "algorithms" / f"test_{TESTED_TOGETHER.get(algorithm, algorithm)}.py").exists()


def test_repository_is_small() -> None:
    skip = {".git", ".venv", "build", "dist", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
    size = sum(f.stat().st_size for f in ROOT.rglob("*") if f.is_file() and not skip & set(f.parts))
    assert size < 45e6  # of which the shipped pairs are 12


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_linters_are_content(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
