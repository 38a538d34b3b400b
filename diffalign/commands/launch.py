"""Finds recipes by path and starts them: `train/`, `eval/` and `tools/` hold files that are run, never imported."""

from __future__ import annotations

import ast
import logging
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from diffalign.interruption import ENDING, handled

PACKAGE = Path(__file__).resolve().parent.parent
ROOT = PACKAGE.parent if (PACKAGE.parent / "train" / "diffusion_dpo.py").exists() else PACKAGE
"""What holds train/, eval/, tools/ and configs/: the checkout, or the installed package they travel in."""

SHUTDOWN_SECONDS = "600"
"""How long torchrun waits for the checkpoint of a run that it was asked to end, before it kills the processes."""

ACCELERATE = ("accelerate.commands.accelerate_cli", "launch")


def recipes(kind: str) -> dict[str, Path]:
    """Name -> file of every recipe of a kind: `train`, `eval` or `tools`."""
    return {p.stem: p for p in sorted((ROOT / kind).glob("*.py"))}


def known(kind: str) -> dict[str, Path]:
    """What can be named after `diffalign train`, `diffalign eval`: after eval the tools too, as `eval generate`."""
    return recipes(kind) | (recipes("tools") if kind == "eval" else {})


def find(kind: str, name: str) -> Path:
    """The file of a recipe. Raises ValueError with the known names."""
    found = known(kind)
    if name not in found:
        raise ValueError(f"no {kind} recipe '{name}'; known recipes: {', '.join(found)}")
    return found[name]


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
    accelerate follows; its own launcher starts them only through MPI. Signals are handled as in `call`.
    """
    gpus = 0 if processes == 1 else _gpus()  # asking takes seconds
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
    quiet = ["-m", "diffalign.commands.launch", *launcher] if launcher else []
    command = [sys.executable, *quiet, str(recipe), *arguments]
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS)
    return call(command, environment)


def call(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command and return its exit code, 128 + n where signal n killed it.

    SIGTERM, SIGINT and SIGHUP are passed on to it and what it started, and waited for; where it then ends with another
    code than 0, so does this process: raises SystemExit(128 + n). It has a process group of its own, for otherwise a
    terminal's Ctrl-C would reach it twice, and the second signal ends a run at once.
    """
    children: list[subprocess.Popen[bytes]] = []
    seen: list[int] = []

    def pass_on(signum: int, frame: FrameType | None = None) -> None:
        seen.append(signum)
        for child in children:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signum)

    with handled((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), pass_on):
        children.append(subprocess.Popen(command, env=environment, start_new_session=True))
        for signum in seen[:1]:  # it came before there was a process
            pass_on(signum)
        code = children[0].wait()
    code = code if code >= 0 else 128 - code
    if seen and code:
        raise SystemExit(128 + seen[0])
    return code


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _launch(module: str, *words: str) -> int:
    """Run a launcher without what it says of a process that failed, for that has said it; returns its exit code."""
    logging.disable(logging.ERROR)
    sys.argv = [module, *words]
    try:
        with handled(ENDING, _ended):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except subprocess.CalledProcessError as error:  # accelerate's
        return error.returncode
    except Exception as error:
        if type(error).__name__ == "SignalException":  # torchrun's, which has passed it on
            return 128 + error.sigval  # type: ignore[attr-defined]
        if type(error).__name__ != "ChildFailedError":
            raise
        return max(failure.exitcode for failure in error.failures.values())  # type: ignore[attr-defined]
    return 0


def _ended(signum: int, frame: FrameType | None) -> None:
    """A child in this process group got the signal as well, and is waited for; torchrun has a handler of its own."""
    if not psutil.Process().children():
        sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(_launch(*sys.argv[1:]))
