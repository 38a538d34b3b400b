"""Values of settings: types, and the text of `key=value`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytest

from reward_models.settings import from_text, typed, words

Many = Literal["a", "no", 3]


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("1234", str, "1234"),
        ("false", str, "false"),
        ("none", str, "none"),
        ("none", str | None, None),
        ("none", int | None, None),
        ("-7", int, -7),
        ("7", float, 7.0),
        ("1e-4", float | None, 1e-4),
        ("true", bool, True),
        ("false", bool, False),
        ("no", Many, "no"),
        ("3", Many, 3),
        ("a.json", Mapping[str, Any] | str, "a.json"),
    ],
)
def test_text_is_taken_literally_where_the_type_takes_text(text: str, hint: Any, value: Any) -> None:
    found = from_text(text, hint)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "hint"), [("1.5", int), ("yes", bool), ("1", bool), ("two", float), ("b", Many), ("none", int), ("", int)]
)
def test_text_that_fits_no_type_is_refused(text: str, hint: Any) -> None:
    with pytest.raises(TypeError):
        from_text(text, hint)


def test_descriptions_of_types() -> None:
    assert words(tuple[int, ...] | None) == "a list of int or null" and words(Many) == "one of a, no, 3"
    assert words(bool) == "true or false" and typed([1, 2], tuple[float, ...]) == (1.0, 2.0)
