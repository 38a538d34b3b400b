"""Data card of preference data made by eval/synthesize.py. Text from data and settings is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.report.model_card import escaped, public, table
from reward_models.files import read_json

CARD = """# {title}

Preference data made by `diffalign synthesize`: {made}.

## Images

{images}

## Labels

{labels}

## Rules

{rules}

## Left out

{dropped}

## Cost

{cost}

## Licence

That of the generators and scorers named above; `reward-score info NAME` prints those of scorers.
"""


def data_card(
    title: str,
    made: str,
    folders: Mapping[Path, int],
    asked: Sequence[tuple[str, str, Mapping[str, Any]]],
    notes: Sequence[str],
    rules: Mapping[str, Any],
    dropped: Mapping[str, int],
    spent: Sequence[str],
) -> str:
    """The card as Markdown.

    made     what the data set has, in words
    folders  folder of each generator -> number of images; its settings.json says how they were made
    asked    scorers and judges: spec, what they do, and what their answers depend on
    notes    what the votes of each judge say about it
    rules    options of the command
    dropped  reason -> how many were left out
    spent    what each judge cost
    """
    images = [(public(folder), n, _words(_settings(folder))) for folder, n in folders.items()]
    labels = [(public(spec), does, _words(depends)) for spec, does, depends in asked]
    left_out = sorted(dropped.items(), key=lambda one: -one[1])
    return CARD.format(
        title=escaped(title),
        made=escaped(made),
        images=table(("folder", "images", "made with"), images),
        labels="\n\n".join([table(("scorer or judge", "does", "depends on"), labels), *map(escaped, notes)]),
        rules=table(("option", "value"), [(name, public(value)) for name, value in rules.items()]),
        dropped=table(("reason", "number"), left_out) if left_out else "Nothing.",
        cost="\n".join(f"- {escaped(line)}" for line in spent) or "No judge over HTTP was asked.",
    )


def _settings(folder: Path) -> dict[str, Any]:
    """How the images were made. A damaged file is said in the card: the labels were paid for."""
    file = folder / "settings.json"
    try:
        found = read_json(file) if file.exists() else {}
        return found | found.pop("versions", {})
    except (ValueError, OSError, TypeError, AttributeError):
        return {file.name: "is damaged"}


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {public(value)}" for name, value in settings.items() if value not in (None, []))
