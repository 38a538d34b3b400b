"""Configuration: keyword-only constructor parameters are the schema; YAML plus `section.key=value` fill it in.

Everything that is wrong is reported in one message, before anything loads.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import math
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffalign.config_help import keys
from reward_models.files import read_text
from reward_models.settings import typed, words

Section = Callable[..., Any]
"""What a section configures: a class or a function. Its attribute `check`, where it has one, takes the values of the
section, and those of every other section whose name is one of its parameters (and the section's own name as `section`);
it returns one line a problem."""


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one problem a line."""


@dataclass(eq=False)
class SweepRequest(Exception):
    """`--sweep` was given: instead of one run, `diffalign.commands.sweep.sweep` takes these arguments."""

    recipe: Path
    axes: Sequence[str]
    arguments: Sequence[str]
    resolved: Callable[[Sequence[str]], Config]
    prompts: str | None
    scorer: str | None


class Config:
    """The resolved configuration: one dict a section, as attributes (`cfg.optimizer["lr"]`).

    factories: what each section configures, as given to `parse`.
    """

    def __init__(self, sections: dict[str, dict[str, Any]], factories: Mapping[str, Section] | None = None):
        self.sections, self.factories = sections, factories or {}

    def __contains__(self, name: str) -> bool:
        return name in self.sections

    def make(self, name: str, *wiring: Any) -> Any:
        """What a section configures, made of its positional `wiring` and the section's keys."""
        return self.factories[name](*wiring, **self.sections[name])

    def __getattr__(self, name: str) -> dict[str, Any]:
        try:
            return self.__dict__["sections"][name]
        except KeyError:
            raise AttributeError(f"no section '{name}'; sections: {', '.join(self.sections)}") from None

    def yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(self.sections))


def parse(argv: Sequence[str] | None, recipe: str, **sections: Section) -> Config:
    """Command line -> configuration; exits with status 2 and one message when anything is wrong.

    Raises SweepRequest where --sweep asks for several runs.

    recipe is the `__file__` of the recipe: its docstring is the help text, `configs/<its name>/` holds its YAML files.
    """
    file = Path(recipe)
    folder = _configs(file)
    parser = command_line(file)
    args = parser.parse_intermixed_args(argv)
    if (args.sweep_prompts or args.sweep_scorer) and not args.sweep:
        parser.error("--sweep-prompts and --sweep-scorer belong to --sweep")
    try:
        content = read(args.config, folder)
        if args.sweep:
            arguments = [*(["--config", args.config] if args.config else []), *args.overrides]
            raise SweepRequest(
                file.resolve(),
                args.sweep,
                arguments,
                lambda more: resolve(content, [*args.overrides, *more], sections),
                args.sweep_prompts,
                args.sweep_scorer,
            )
        return resolve(content, args.overrides, sections)
    except ConfigError as error:
        print(f"{file.name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _configs(recipe: Path) -> Path:
    return recipe.resolve().parent.parent / "configs" / recipe.stem


def command_line(recipe: Path) -> argparse.ArgumentParser:
    """What a recipe understands. Imports nothing of what it configures, so that help comes at once."""
    parser = argparse.ArgumentParser(
        prog=recipe.name,
        description=inspect.cleandoc(ast.get_docstring(ast.parse(recipe.read_text(encoding="utf-8"))) or ""),
        epilog=keys(recipe, words),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = ", ".join(sorted(p.stem for p in _configs(recipe).glob("*.yaml")))
    parser.add_argument("--config", help=f"YAML file, or the name of a shipped one: {names}")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="what to change; see the keys below")
    parser.add_argument("--sweep", action="append", default=[], metavar="section.key=v1,v2", help="docs/sweep.md")
    parser.add_argument("--sweep-prompts", metavar="FILE", help="held-out prompts, which the playground has")
    parser.add_argument("--sweep-scorer", metavar="SPEC", help="who judges their images; the playground has a judge")
    return parser


def read(name: str | None, folder: Path) -> dict[str, Any]:
    """The content of a YAML file, given by path or by the name of one in `folder`."""
    if name is None:
        return {}
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none"
        raise ConfigError(f"no config '{name}': give a .yaml file or the name of a shipped one ({known})")
    try:
        content = OmegaConf.create(read_text(path))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise ConfigError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(content):
        raise ConfigError(f"'{path}' must hold sections such as 'run:' and 'trainer:', not a list")
    return content  # type: ignore[return-value]


def resolve(content: Any, overrides: Sequence[str], sections: Mapping[str, Section]) -> Config:
    """Merge, fill in defaults and check. Raises ConfigError with every problem found."""
    bad = [x for x in overrides if "=" not in x or "." not in x.split("=")[0]]
    if bad:
        raise ConfigError(f"expected section.key=value, got {', '.join(bad)}")
    try:
        merged = OmegaConf.merge(OmegaConf.create(content), OmegaConf.from_dotlist(list(overrides)))
        given = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    assert isinstance(given, dict)
    problems = [_unknown("section", str(s), sections) for s in given if s not in sections]
    resolved: dict[str, dict[str, Any]] = {}
    for name, factory in sections.items():
        values, wrong = _section(name, factory, given.get(name) or {})
        if not wrong:
            resolved[name] = values
        problems += wrong
    for name, factory in sections.items():
        problems += _checked(name, factory, resolved)
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        raise ConfigError(f"{count} in the configuration:\n" + "\n".join(f"  - {p}" for p in problems))
    return Config(resolved, sections)


def _section(name: str, factory: Section, given: Any) -> tuple[dict[str, Any], list[str]]:
    if not isinstance(given, dict):
        return {}, [f"section '{name}' must hold keys, got {given!r}"]
    schema = parameters(factory)
    problems = [_unknown("key", f"{name}.{k}", [f"{name}.{s}" for s in schema]) for k in given if k not in schema]
    values: dict[str, Any] = {}
    for key, (hint, default) in schema.items():
        if key not in given or given[key] == "???":  # OmegaConf's mark of a value still to be given
            if default is inspect.Parameter.empty:
                problems.append(f"'{name}.{key}' is missing; it must be {words(hint)}")
            values[key] = default
            continue
        try:
            values[key] = typed(given[key], hint)
        except TypeError:
            problems.append(f"'{name}.{key}' must be {words(hint)}, got {given[key]!r}")
            continue
        numbers = values[key] if isinstance(values[key], tuple) else (values[key],)
        if any(isinstance(x, float) and not math.isfinite(x) for x in numbers):
            problems.append(f"'{name}.{key}' = {given[key]} must be finite")
    return values, problems


def _checked(name: str, factory: Section, resolved: Mapping[str, dict[str, Any]]) -> list[str]:
    """What the section's own check says, as far as all sections that it looks at could be read."""
    check = getattr(factory, "check", None)
    others = list(inspect.signature(check).parameters)[1:] if check else []
    if check is None or not all(x in resolved for x in (name, *others) if x != "section"):
        return []
    try:
        return check(resolved[name], **{x: name if x == "section" else resolved[x] for x in others})
    except OSError as error:
        return [f"section '{name}': {error}"]


def too_small(section: str, cfg: Mapping[str, Any], **least: float) -> list[str]:
    """A line for every key whose value is below its least one; null is not."""
    return [
        f"'{section}.{key}' = {cfg[key]} must be {low:g} or more"
        for key, low in least.items()
        if cfg[key] is not None and not cfg[key] >= low
    ]


def parameters(factory: Section) -> dict[str, tuple[Any, Any]]:
    """Name -> (type, default) of the keyword-only parameters, which are the config keys."""
    function = factory.__init__ if inspect.isclass(factory) else factory  # type: ignore[misc]
    hints = typing.get_type_hints(function)
    keys = [p for p in inspect.signature(factory).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {p.name: (hints[p.name], p.default) for p in keys}


def _unknown(kind: str, name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"unknown {kind} '{name}'" + (f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}")
