"""The main of a recipe or an evaluation as a program: errors in a line or two, exit codes, libraries kept quiet."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

SAYS_NOTHING = ("should be kept in float32: []", "No LoRA keys associated to", "`torch_dtype` is deprecated")
"""Warnings of diffusers and transformers about what is as it should be."""


def run(main: Callable[[], int | None]) -> NoReturn:
    """The main of a recipe as a program: what a user can cause is a line or two on stderr, and exit code 2.

    With DIFFALIGN_TRACEBACK set it is raised, so that one can see where it came from.
    """
    quiet()
    try:
        sys.exit(_main_or_sweep(main))
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


def _main_or_sweep(main: Callable[[], int | None]) -> int | None:
    from diffalign.config import SweepRequest  # an evaluation needs none of it

    try:
        return main()
    except SweepRequest as request:
        from diffalign.commands.sweep import sweep

        return sweep(**vars(request))


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
