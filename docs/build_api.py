"""The API pages, from the docstrings: python docs/build_api.py FOLDER, and open FOLDER/index.html.

pdoc does the work (pip install -e ".[test]"). A module that cannot be imported or a warning of pdoc's stops it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import warnings
from pathlib import Path
from typing import Any, get_type_hints

import pdoc
import pdoc.render

PACKAGES = ("diffalign", "reward_models")


def modules() -> list[str]:
    """The names of all modules, but for the two that run a command when they are imported."""
    found = (pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.") for package in PACKAGES)
    names = [module.name for some in found for module in some if not module.name.endswith("__main__")]
    return [*PACKAGES, *names]


def build(folder: Path) -> None:
    """Write a page for each module into the folder. Raises what a module raises, and warnings as errors."""
    for name in modules():
        prepare(importlib.import_module(name))
    pdoc.render.configure(docformat="google", template_directory=Path(__file__).parent / "pdoc", show_source=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module=r"pdoc\.")
        pdoc.pdoc(*PACKAGES, output_directory=folder)


def prepare(module: Any) -> None:
    """Each name gets one page, that of its own module; pdoc cannot look up the types of a NamedTuple's fields."""
    vars(module).pop("__all__", None)
    for value in vars(module).values():
        if inspect.isclass(value) and issubclass(value, tuple) and value.__module__ == module.__name__:
            value.__new__.__annotations__ = get_type_hints(value)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python docs/{Path(__file__).name} FOLDER")
    build(Path(sys.argv[1]))
