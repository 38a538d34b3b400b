"""The hub of Hugging Face: asked once and quickly whether it is there."""

from __future__ import annotations

import os
from functools import cache

from huggingface_hub import constants, utils

PATIENCE = 4.0
"""Seconds in which it must answer."""


@cache
def reachable() -> bool:
    """Whether the hub answers. Where it does not, this process and those it starts use what is in the local cache at
    once; left to themselves, the libraries ask again and again for up to a minute, in a hundred lines."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        utils.get_session().head(constants.ENDPOINT, timeout=PATIENCE)
        return True
    except Exception:  # of requests or of httpx, by the version of huggingface_hub
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
        getattr(utils, "reset_sessions", lambda: None)()
        return False


def missing(name: str, error: Exception) -> str:
    """Why a hub id cannot be had, in one line, from what a library raised."""
    if not reachable():
        return f"'{name}' is not in the local cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set)"
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
    return f"the hub does not give '{name}': {said}"
