"""The keys of a recipe for `--help`, read from sources: importing what they configure would take ten seconds."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

PACKAGES = Path(__file__).resolve().parent.parent
"""Where diffalign/ and reward_models/ lie."""
OURS = ("diffalign", "reward_models")
Function = ast.FunctionDef


def keys(recipe: Path, words: Any) -> str:
    """The help text of every key of the sections that a recipe gives to `config.parse`: type, default, and what the
    Args of the docstring say of it. words turns a type into words."""
    tree, lines = _tree(recipe), ["keys:"]
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "config.parse")
    for section in (keyword for call in calls for keyword in call.keywords):
        file, node = _find(recipe, ast.unparse(section.value))
        file, function, said = _constructor(file, node)
        for parameter, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
            kind = _typed(file, parameter.annotation, words)
            value = "required" if default is None else f"default {_value(file, default)}"
            about = _about(said, parameter.arg)
            lines.append(f"  {section.arg}.{parameter.arg}: {kind} ({value}){'  ' + about if about else ''}")
    return "\n".join(lines)


def _about(said: str, name: str) -> str:
    """The lines under Args that belong to a parameter, as one."""
    found = re.search(rf"^( *){name}: (.*(?:\n\1 +\S.*)*)", said, re.MULTILINE)
    return " ".join(found[2].split()) if found else ""


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _file(module: str) -> Path:
    path = PACKAGES.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _find(file: Path, name: str) -> tuple[Path, Any]:
    """Where a name of a file is defined, and how: a class, a function, or the value that it is given."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, (ast.ClassDef, Function)) and node.name == name:
            return file, node
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return file, node.value
        if isinstance(node, ast.AnnAssign) and node.value is not None and ast.unparse(node.target) == name:
            return file, node.value
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _find(_file(node.module), alias.name)
    raise LookupError(f"no '{name}' in '{file}'")


def _constructor(file: Path, node: Any) -> tuple[Path, Function, str]:
    """The function whose keyword-only parameters are the keys, its file, and all docstrings that may tell of them."""
    said = ast.get_docstring(node) or ""
    if isinstance(node, Function):
        return file, node, said
    own = [x for x in node.body if isinstance(x, Function) and x.name == "__init__"]
    if own:
        return file, own[0], said
    for where, base in _bases(file, node):
        found, function, more = _constructor(where, base)
        return found, function, f"{said}\n{more}"
    return file, ast.parse("def __init__(self): ...").body[0], said  # type: ignore[return-value]


def _bases(file: Path, node: ast.ClassDef) -> Iterator[tuple[Path, ast.ClassDef]]:
    for base in node.bases:
        try:
            where, found = _find(file, ast.unparse(base))
        except LookupError:  # a class of somebody else's
            continue
        if isinstance(found, ast.ClassDef):
            yield where, found


def _typed(file: Path, annotation: ast.expr | None, words: Any) -> str:
    """An annotation in words; names of types that a file gives to others, such as a Literal, are looked up."""
    names: dict[str, Any] = {"Literal": Literal, "Any": Any}
    for node in ast.walk(annotation) if annotation else ():
        if isinstance(node, ast.Name) and node.id not in ("str", "int", "float", "bool", "tuple", "list", *names):
            names[node.id] = eval(ast.unparse(_find(file, node.id)[1]), {"Literal": Literal})
    return words(eval(ast.unparse(annotation), names)) if annotation else "anything"


def _value(file: Path, default: ast.expr) -> Any:
    """A default: a constant, or one that has a name."""
    if isinstance(default, ast.Name):
        return _value(*_find(file, default.id))
    try:
        return ast.literal_eval(default)
    except ValueError:
        return ast.unparse(default)
