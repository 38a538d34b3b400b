"""Checks of the `data` section of recipes that train on latents."""

from __future__ import annotations

from typing import Any

from diffalign.data.buckets import check_buckets
from diffalign.data.readers import find_reader


def check_latents(cfg: dict[str, Any]) -> list[str]:
    """Problems with a `data` section, one line each."""
    problems = []
    try:
        find_reader(cfg["path"])
    except (FileNotFoundError, ValueError) as error:
        problems.append(f"'data.path': {error}")
    if cfg["crop"] not in ("center", "random"):
        problems.append(f"'data.crop' = {cfg['crop']} must be center or random")
    if cfg["crop"] == "random" and cfg["cache"] != "off":
        problems.append("'data.crop' = random needs 'data.cache' = off: only latents of the centre crop are cached")
    for name in ("resolution", "batch_size", "limit", "draws_per_sample"):
        if cfg[name] is not None and cfg[name] < 1:
            problems.append(f"'data.{name}' = {cfg[name]} must be 1 or more")
    if cfg["num_workers"] < 0:
        problems.append(f"'data.num_workers' = {cfg['num_workers']} must be 0 or more")
    problems += check_buckets(cfg.get("buckets"), cfg.get("max_aspect", 2.0), cfg["resolution"], cfg["cache"])
    for name in ("caption_dropout", "max_dropped"):
        if not 0 <= cfg[name] <= 1:
            problems.append(f"'data.{name}' = {cfg[name]} must be in [0, 1]")
    return problems
