"""The two score networks beside a few-step generator: the frozen reference, and the aux network that starts as it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import nn

from diffalign.networks.loading import Backbone, load_backbone
from diffalign.networks.lora import GENERATOR, Adapter, add_lora, lora_layers
from diffalign.networks.placement import Placement
from diffalign.networks.reference import AdapterOffReference, FrozenReference, reference_for

AUX = "aux"


class ScoreNetworks(NamedTuple):
    """aux to be trained, and reference, both denoisers; `using_*` makes the network be that one while it lasts."""

    aux: nn.Module
    reference: AdapterOffReference | FrozenReference
    using_aux: Callable[[], AbstractContextManager[Any]]
    using_reference: Callable[[], AbstractContextManager[Any]]


def score_networks(backbone: Backbone, placement: Placement, start: str, **teacher: Any) -> ScoreNetworks:
    """From the backbone that generates, the path it started from, and the teacher's settings for `load_backbone`.

    Where both are LoRAs on the same weights, these are in memory once: the backbone's denoiser becomes an Adapter.
    """
    shared, rank = backbone.denoiser, teacher["lora_rank"]
    if teacher["path"] == start and rank and lora_layers(shared):
        settings = {"alpha": teacher["lora_alpha"], "targets": teacher["lora_targets"], "seed": teacher["seed"]}
        add_lora(backbone.denoiser.network, rank=rank, name=AUX, **settings)
        backbone.denoiser = Adapter(shared, GENERATOR)  # type: ignore[assignment]
        aux = Adapter(shared, AUX)
        backbone.denoiser.activate()  # type: ignore[operator]
        reference = AdapterOffReference(shared)
        return ScoreNetworks(aux, reference, aux.using, reference.using)
    denoiser = load_backbone(placement, **teacher).denoiser
    frozen = reference_for(denoiser)
    return ScoreNetworks(denoiser, frozen, nullcontext, frozen.using)
