"""Tiny scorers of the playground world, real ones in all but size: made by `train/hps.py` and `train/vp_score.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PLAYGROUND = Path(__file__).parent


def hps() -> Any:
    """The CLIPScorer that learned the playground's common taste."""
    from reward_models.clip.scorers import CLIPScorer
    from reward_models.weights import read_config

    return CLIPScorer.from_folder(PLAYGROUND / "hps", read_config(PLAYGROUND / "hps"))


def vp_score() -> Any:
    """The BLIPScorer that learned the playground's common taste and four aspects of it."""
    from reward_models.blip.scorers import BLIPScorer
    from reward_models.weights import read_config

    return BLIPScorer.from_folder(PLAYGROUND / "vp_score", read_config(PLAYGROUND / "vp_score"))
