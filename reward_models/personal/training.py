"""New heads of personal scorers, for the recipe that trains them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from reward_models.clip.scorers import CLIPFeatures
from reward_models.personal.heads import HEADS
from reward_models.personal.scorers import PersonalScorer


def head_to_train(
    features: CLIPFeatures,
    people: int,
    statistics: tuple[Tensor, Tensor],
    *,
    features_from: str = "pickscore",
    head: Literal["pal", "vpl", "groups", "logistic", "gpm", "micro"] = "pal",
    size: int = 3,
    latent: int = 16,
    hidden: int = 64,
    variant: Literal["A", "B"] = "A",
    distance: Literal["euclid", "angle"] = "euclid",
    spread: float = 0.1,
    seed: int = 0,
) -> PersonalScorer:
    """A personal scorer with a new head.

    features    the CLIP scorer of `features_from`
    people      number of persons in the training data
    statistics  mean and standard deviation [3E] of the features

    Args:
        features_from: scorer on CLIP that provides the frozen features (clip, hps_v2.1, pickscore, playground_hps, ...)
        head: pal, ideal points among prototypes; vpl, variational; groups, one reward per group; logistic, baseline;
            gpm, cyclic preferences between two images; micro, several rewards routed by the prompt
        size: width of a user vector: PAL's prototypes, VPL's latent, number of groups, of GPM's blocks, of MiCRo's
            rewards; not for the logistic head
        latent: PAL: dimension of the ideal points
        hidden: width of hidden layers; 0 for a linear map in PAL
        variant: PAL-A, or PAL-B with prototypes that depend on the prompt
        distance: PAL: euclid or angle
        spread: standard deviation of the logistic head's Gaussian prior around the population vector
        seed: seed of the initial weights
    """
    width = statistics[0].numel() // 3
    pal: Any = {"people": people, "prototypes": size, "latent": latent, "variant": variant, "distance": distance}
    settings = {
        "pal": {**pal, "hidden": hidden},
        "vpl": {"latent": size, "hidden": hidden},
        "groups": {"groups": size, "hidden": hidden},
        "logistic": {"spread": spread},
        "gpm": {"blocks": size, "hidden": hidden},
        "micro": {"components": size, "hidden": hidden},
    }[head]
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU; torch.manual_seed would touch every device
        torch.default_generator.manual_seed(seed)
        made = HEADS[head](width, **settings)
    made.mean.copy_(statistics[0])
    made.std.copy_(statistics[1])
    scorer = PersonalScorer(features, made, features_from)
    scorer.features.requires_grad_(False)
    return scorer


def check_head(cfg: dict[str, Any]) -> list[str]:
    """The errors of a `scorer` section of a config, one line each."""
    problems = [f"'scorer.{k}' = {cfg[k]} must be 1 or more" for k in ("size", "latent") if cfg[k] < 1]
    if cfg["hidden"] < (0 if cfg["head"] == "pal" else 1):
        problems.append(
            f"'scorer.hidden' = {cfg['hidden']} must be positive; 0 (a linear map) is for 'scorer.head' = pal only"
        )
    if cfg["head"] != "pal" and (cfg["variant"], cfg["distance"]) != ("A", "euclid"):
        problems.append("'scorer.variant' and 'scorer.distance' are used only with 'scorer.head' = pal; leave them out")
    if not cfg["spread"] > 0:
        problems.append(f"'scorer.spread' = {cfg['spread']} must be positive")
    return problems


head_to_train.check = check_head  # type: ignore[attr-defined]
