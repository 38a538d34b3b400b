"""Reward cards: one per scorer, consistent with the code."""

from __future__ import annotations

import subprocess
import sys

import pytest

from reward_models.folder.cards import CARDS, WIDTH, card_text
from reward_models.loading import SCORERS


def test_every_name_has_a_card_and_every_card_a_name() -> None:
    assert [name for name in CARDS if name not in SCORERS] == []
    assert [name for name in SCORERS if name not in CARDS] == []


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_every_field(name: str) -> None:
    text = card_text(name)
    for label in (
        "source ",
        "licence ",
        "architecture ",
        "images ",
        "prompts ",
        "unit ",
        "typical ",
        "accuracy",
        "known f",
    ):
        assert f"\n{label}" in text
    assert all(len(line) <= WIDTH + 20 for line in text.splitlines())
    assert f"--scorer {name} " in text and "{}" not in text
    for accuracy in CARDS[name].accuracies:
        assert 40 < accuracy.percent < 90 and accuracy.source
        assert f"{accuracy.percent:.1f}  {accuracy.data}: {accuracy.source}" in text


def test_cards_of_published_files_name_them() -> None:
    from reward_models.clip import published as published
    from reward_models.clip.aesthetic import ORIGINAL, SOURCE

    rows = {"hps_v2": published.HPS_V2, "hps_v2.1": published.HPS_V2_1, "pickscore": published.PICKSCORE}
    for name, row in rows.items():
        assert row.source in CARDS[name].source and row.filename in CARDS[name].source
        assert CARDS[name].unit.startswith(row.unit)
    assert CARDS["social_reward"].unit.startswith(published.SOCIAL_REWARD.unit)
    assert ORIGINAL in CARDS["aesthetic"].source and SOURCE in CARDS["aesthetic"].source


def test_an_unknown_name_is_an_error_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no card of 'pick_score', did you mean 'pickscore'\?; known: clip, hps_v2"):
        card_text("pick_score")


def test_cards_do_not_import_torch() -> None:
    code = "import sys, reward_models.folder.cards as c; c.card_text('clip'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
