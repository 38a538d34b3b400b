"""Finds recipes by path and starts them: `train/` and `eval/` are files that are run, never packages that are imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent if (PACKAGE.parent / "train" / "diffusion_dpo.py").exists() else PACKAGE
"""What holds train/, eval/ and configs/: the checkout, or the installed package they travel in."""


def recipes(kind: str) -> dict[str, Path]:
    """Name -> file of every recipe of a kind, `train` or `eval`."""
    return {p.stem: p for p in sorted((ROOT / kind).glob("*.py"))}


def find(kind: str, name: str) -> Path:
    """The file of a recipe. Raises ValueError with the known names."""
    known = recipes(kind)
    if name not in known:
        raise ValueError(f"no {kind} recipe '{name}'; known recipes: {', '.join(known)}")
    return known[name]


def configs(name: str) -> list[Path]:
    """The shipped configurations of a train recipe."""
    return sorted((ROOT / "configs" / name).glob("*.yaml"))


def title(recipe: Path) -> str:
    """The first line of a recipe's docstring."""
    return (ast.get_docstring(ast.parse(recipe.read_text())) or "").split("\n")[0]


def accelerate_command(recipe: Path, arguments: Sequence[str], *, processes: int | None, config: str | None) -> list[str]:
    """The `accelerate launch` command of a recipe: a config file or the name of a shipped one, else defaults.

    Without either, one process a GPU, or one on the CPU.
    """
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    if config is not None:
        shipped = ROOT / "configs" / "accelerate" / f"{config}.yaml"
        command += ["--config_file", str(shipped if shipped.exists() else config)]
    else:
        command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
        processes = processes or _gpus() or 1
    if processes is not None:
        command += [f"--num_processes={processes}"]
        if processes > 1 and _gpus():
            command.append("--multi_gpu")
    if not _gpus() and config is None:
        command.append("--cpu")
    return [*command, str(recipe), *arguments]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
