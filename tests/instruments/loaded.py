"""Backbones that tests may train, without loading a pipeline again for each."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch

from diffalign.networks.loading import Backbone, load_backbone


@cache
def _frozen(path: Path, **settings: Any) -> dict[str, Any]:
    """Text encoders and autoencoder of all backbones with these settings, filled by the first that needs them."""
    return {}


@cache
def _loaded(path: Path, **settings: Any) -> Backbone:
    backbone = load_backbone(torch.device("cpu"), path=str(path), **settings)
    backbone._parts = _frozen(path, **{k: x for k, x in settings.items() if not k.startswith("lora_")})
    return backbone


def loaded(path: Path, **settings: Any) -> Backbone:
    """`load_backbone` on the CPU. The trainable network is a copy of its own; the frozen parts are shared."""
    backbone = copy.copy(_loaded(path, **settings))
    backbone.denoiser = copy.deepcopy(backbone.denoiser)
    return backbone
