"""Finds recipes by path and starts them: `train/` and `eval/` hold files that are run, never imported."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent if (PACKAGE.parent / "train" / "diffusion_dpo.py").exists() else PACKAGE
"""What holds train/, eval/ and configs/: the checkout, or the installed package they travel in."""

ACCELERATE = ("accelerate.commands.accelerate_cli", "launch")


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


def start(recipe: Path, arguments: Sequence[str], *, processes: int | None, config: str | None) -> int:
    """Run a recipe in one or more processes; returns its exit code.

    With an accelerate config file, or the name of a shipped one, or on several GPUs by `accelerate launch`. Without
    either, one process a GPU, or one on the CPU. Several CPU processes are started by torchrun, which
    accelerate follows; its own launcher starts them only through MPI.
    """
    gpus = _gpus()
    environment = dict(os.environ)
    if config is None and not gpus and (processes or 1) > 1:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment["ACCELERATE_USE_CPU"] = "true"
    elif config is not None:
        shipped = ROOT / "configs" / "accelerate" / f"{config}.yaml"
        launcher = [*ACCELERATE, "--config_file", str(shipped if shipped.exists() else config)]
        launcher += [f"--num_processes={processes}"] if processes else []
    elif (count := processes or gpus or 1) > 1:
        launcher = [*ACCELERATE, "--multi_gpu", "--num_machines=1", f"--num_processes={count}"]
        launcher += ["--mixed_precision=no", "--dynamo_backend=no"]
    else:
        launcher = []
    command = [sys.executable, *(["-m", *launcher] if launcher else []), str(recipe), *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
