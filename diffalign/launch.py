"""Finds recipes by path and starts them: `train/` and `eval/` hold files that are run, never imported."""

from __future__ import annotations

import ast
import importlib
import logging
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from diffalign.interruption import ENDING, handled

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent if (PACKAGE.parent / "train" / "diffusion_dpo.py").exists() else PACKAGE
"""What holds train/, eval/ and configs/: the checkout, or the installed package they travel in."""

SAYS_NOTHING = ("should be kept in float32: []", "No LoRA keys associated to", "`torch_dtype` is deprecated")
"""Warnings of diffusers and transformers about what is as it should be."""

SHUTDOWN_SECONDS = "600"
"""How long torchrun waits for the checkpoint of a run that it was asked to end, before it kills the processes."""

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


def run(main: Callable[[], int | None]) -> NoReturn:
    """The main of a recipe as a program: what a user can cause is a line or two on stderr, and exit code 2.

    With DIFFALIGN_TRACEBACK set it is raised, so that one can see where it came from.
    """
    quiet()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not of_user(error) or os.environ.get("DIFFALIGN_TRACEBACK"):
            raise
        for bar in list(sys.modules["tqdm"].tqdm._instances) if "tqdm" in sys.modules else ():
            bar.close()  # or the error stands at its end
        rank = os.environ.get("RANK", "0")
        where = Path(sys.argv[0]).name + (f" (process {rank})" if rank != "0" else "")
        print(f"{where}: {said(error)}", file=sys.stderr)
        sys.exit(2)


def quiet() -> None:
    """Leave out what libraries say that means nothing to the user of a recipe: bars of a dozen small files, notices of
    what is as it should be. Whatever else they warn of is shown."""
    for name in ("diffusers", "transformers"):
        if name in sys.modules:  # a recipe has imported them, or has no use for them
            importlib.import_module(f"{name}.utils.logging").disable_progress_bar()
            for handler in logging.getLogger(name).handlers:
                handler.addFilter(_says_something)
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator")


def _says_something(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in SAYS_NOTHING)


def of_user(error: BaseException) -> bool:
    """Whether a user can cause it: settings, files, disks, data, memory; the rest are faults of ours, with a trace."""
    kinds = (ValueError, OSError, FloatingPointError)
    return isinstance(error, kinds) or type(error).__name__ in ("SafetensorError", "OutOfMemoryError")


def said(error: BaseException) -> str:
    """What an error says, without the number that the system gives it; of what libraries say, two lines."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": '{error.filename}'" if error.filename else "")
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    more = "lower data.batch_size, or set backbone.gradient_checkpointing"
    if type(error).__name__ == "OutOfMemoryError":
        return f"{lines[0][:200]}\n{more}"
    return "\n".join(lines if isinstance(error, ValueError) else lines[:2])


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
    quiet = ["-m", "diffalign.launch", *launcher] if launcher else []
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
