"""Programs of eval/ as modules: they are run by path and belong to no package."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from diffalign.commands import launch


def program_module(name: str) -> ModuleType:
    """The module of eval/<name>.py, newly executed."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", launch.find("eval", name))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
