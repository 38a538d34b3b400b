"""The layout of the repository: who may import whom, packaging, sizes, names."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("diffalign", "reward_models")

LAYERS = (
    ("types", "signals", "config_help"),
    ("draws", "config"),
    ("diffusion", "playground", "report"),
    ("objectives", "networks"),
    ("data",),
    ("algorithms",),
    ("training", "people"),
    ("commands",),
    ("__main__",),
)
"""The files and folders of diffalign/, lowest first: each may import those of the rows above it, and itself."""

SCORER_LAYERS = (
    ("protocol", "placement", "files", "accuracy"),
    ("images",),
    ("preprocess", "weights"),
    ("base", "loading"),
    ("clip", "cards", "mixture"),
    ("blip", "folder"),
    ("playground", "personal"),
    ("training",),
    ("__main__",),
)
"""The same of reward_models/."""

SHARED = {"reward_models.files", "reward_models.images"}
"""What diffalign may import of reward_models: text, atomic writing, the hub, decoding; no network."""


def _python(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_module(file): file for package in PACKAGES for file in _python(package)}


def _imports(file: Path) -> set[str]:
    """The names of the modules that a file imports, wherever in it: `from a.b import c` counts as a.b and as a.b.c."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return names


def _imported(module: str) -> set[str]:
    """The modules of ours that a module of ours imports. A package's face hands names on, and is left out."""
    found = _imports(MODULES[module]) & MODULES.keys() - {module}
    return {name for name in found if name not in PACKAGES}


@pytest.mark.parametrize(("package", "layers"), [("diffalign", LAYERS), ("reward_models", SCORER_LAYERS)])
def test_every_import_goes_down(package: str, layers: tuple[tuple[str, ...], ...]) -> None:
    height = {name: k for k, row in enumerate(layers) for name in row}
    units = {m.split(".")[1] for m in MODULES if m.startswith(f"{package}.")}
    assert units == height.keys()
    up = []
    for module in MODULES:
        if not module.startswith(f"{package}."):
            continue
        own = module.split(".")[1]
        below = {n for n in _imported(module) if n.startswith(f"{package}.")}
        up += [f"{module} -> {n}" for n in below if n.split(".")[1] != own and height[n.split(".")[1]] >= height[own]]
    assert not up


def test_no_files_import_each_other_in_a_circle() -> None:
    TopologicalSorter({module: _imported(module) for module in MODULES}).prepare()  # raises CycleError with the circle


def test_packages_do_not_import_each_other_nor_recipes() -> None:
    for package, foreign in (("reward_models", {"diffalign", "diffusers"}), ("diffalign", {"reward_models"})):
        allowed = SHARED if package == "diffalign" else set()
        for file in _python(package):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                wrong = [n for n in names if n.split(".")[0] in foreign | {"train", "eval"} and n not in allowed]
                assert not wrong, f"{file} imports {wrong}"
    for module in SHARED:
        assert _imported(module) <= SHARED, f"{module} must stay light"


def test_one_file_of_a_package_decides_precision() -> None:
    """Device, dtype, autocast, compilation and memory format of networks. Where two files decide, they disagree."""
    files = [f for folder in (*PACKAGES, "train", "eval", "tools") for f in _python(folder)]
    words = r"autocast|torch\.compile|memory_format|\.half\(|\.bfloat16\("
    found = [f for f in files if re.search(words, f.read_text())]
    assert found == [ROOT / "diffalign" / "networks" / "placement.py", ROOT / "reward_models" / "placement.py"]


def test_few_files_lie_directly_in_a_package() -> None:
    for package, most in (("diffalign", 6), ("reward_models", 12)):
        files = {f.stem for f in (ROOT / package).glob("*.py")} - {"__init__", "__main__"}
        assert len(files) <= most, sorted(files)


def _length(node: ast.AST) -> int:
    assert isinstance(node, ast.FunctionDef)
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]


def test_functions_are_short() -> None:
    """50 lines of code at most, a recipe's `main` 30, without their docstrings."""
    long = []
    for file in [*MODULES.values(), *_python("train"), *_python("eval")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                most = 32 if node.name == "main" and file.parent.name == "train" else 50
                if _length(node) > most:
                    long.append(f"{file.relative_to(ROOT)}: {node.name} has {_length(node)} lines")
    assert not long


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


ALGORITHM_OF = {
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
        algorithm = ALGORITHM_OF.get(recipe.stem, recipe.stem)
        assert (ROOT / "configs" / recipe.stem / "playground.yaml").exists()
        assert (ROOT / "diffalign" / "algorithms" / f"{algorithm}.py").exists()
        assert (ROOT / "tests" / "algorithms" / f"test_{TESTED_TOGETHER.get(algorithm, algorithm)}.py").exists()


def test_repository_is_small() -> None:
    skip = {".git", ".venv", "build", "dist", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
    size = sum(f.stat().st_size for f in ROOT.rglob("*") if f.is_file() and not skip & set(f.parts))
    assert size < 30e6


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_linters_are_content(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
