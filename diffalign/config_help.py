"""Help text of a recipe's config keys, parsed from source files. Importing the modules would take ten seconds."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

PACKAGES = Path(__file__).resolve().parent.parent
"""Folder that contains diffalign/ and reward_models/."""
OURS = ("diffalign", "reward_models")
Function = ast.FunctionDef


def keys(recipe: Path, words: Any) -> str:
    """Help text of all config keys of a recipe: type, default, and the description in the docstring's Args.

    The sections are the keyword arguments of `config.parse` in the recipe. `words` converts a type to text.
    """
    tree, lines = _tree(recipe), ["keys:"]
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "config.parse")
    for section in (keyword for call in calls for keyword in call.keywords):
        file, node = _find(recipe, ast.unparse(section.value))
        file, function, docstring = _constructor(file, node)
        for parameter, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
            kind = _typed(file, parameter.annotation, words)
            value = "required" if default is None else f"default {_value(file, default)}"
            about = _description(docstring, parameter.arg)
            lines.append(f"  {section.arg}.{parameter.arg}: {kind} ({value}){'  ' + about if about else ''}")
    return "\n".join(lines)


def _description(docstring: str, name: str) -> str:
    """Description of a parameter in the docstring's Args, as one line."""
    found = re.search(rf"^( *){name}: (.*(?:\n\1 +\S.*)*)", docstring, re.MULTILINE)
    return " ".join(found[2].split()) if found else ""


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _file(module: str) -> Path:
    path = PACKAGES.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _find(file: Path, name: str) -> tuple[Path, Any]:
    """Definition of a name used in a file: the defining file, and the AST node of the class, function or value."""
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
    """The function whose keyword-only parameters are the keys, its file, and the docstrings that may describe them."""
    docstring = ast.get_docstring(node) or ""
    if isinstance(node, Function):
        return file, node, docstring
    own = [x for x in node.body if isinstance(x, Function) and x.name == "__init__"]
    if own:
        return file, own[0], docstring
    for where, base in _bases(file, node):
        found, function, inherited = _constructor(where, base)
        return found, function, f"{docstring}\n{inherited}"
    return file, ast.parse("def __init__(self): ...").body[0], docstring  # type: ignore[return-value]


def _bases(file: Path, node: ast.ClassDef) -> Iterator[tuple[Path, ast.ClassDef]]:
    for base in node.bases:
        try:
            where, found = _find(file, ast.unparse(base))
        except LookupError:  # a class of another package
            continue
        if isinstance(found, ast.ClassDef):
            yield where, found


def _typed(file: Path, annotation: ast.expr | None, words: Any) -> str:
    """An annotation as text; type aliases, such as a named Literal, are looked up."""
    names: dict[str, Any] = {"Literal": Literal, "Any": Any}
    for node in ast.walk(annotation) if annotation else ():
        if isinstance(node, ast.Name) and node.id not in ("str", "int", "float", "bool", "tuple", "list", *names):
            names[node.id] = eval(ast.unparse(_find(file, node.id)[1]), {"Literal": Literal})
    return words(eval(ast.unparse(annotation), names)) if annotation else "anything"


def _value(file: Path, default: ast.expr) -> Any:
    """Value of a default: a literal, or the value of a named constant."""
    if isinstance(default, ast.Name):
        return _value(*_find(file, default.id))
    try:
        return ast.literal_eval(default)
    except ValueError:
        return ast.unparse(default)
