"""Conversion between the published layout of ImageReward checkpoints and that of transformers.

The tensors are the same, with different names. Both layouts fuse queries, keys and values of the image tower, and use
BERT's names in the text tower. The head (`mlp.*`) keeps its name. Unknown names are kept, and the strict loader reports
them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

UNUSED = ("blip.vision_proj.*", "blip.text_proj.*", "blip.text_encoder.embeddings.position_ids")
"""Tensors of a published file that do not affect scores: two projections of BLIP's contrastive loss, and a counter."""

_BLOCKS = "blip.visual_encoder.blocks."
_TOWERS = {
    "blip.text_encoder.": "text.",
    "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "blip.visual_encoder.norm.": "vision.post_layernorm.",
    _BLOCKS: "vision.encoder.layers.",
}
_PARTS = {
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.qkv.": "self_attn.qkv.",
    "attn.proj.": "self_attn.projection.",
    "mlp.": "mlp.",
}


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names -> `vision.` with the names of BlipVisionModel, and `text.` with those of BlipTextModel."""
    return {_renamed(key, _TOWERS, _PARTS, _BLOCKS): value for key, value in state.items()}


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' names -> published names: the inverse of `to_transformers`."""
    towers, parts = ({new: old for old, new in names.items()} for names in (_TOWERS, _PARTS))
    return {_renamed(key, towers, parts, _TOWERS[_BLOCKS]): value for key, value in state.items()}


def body_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two towers of a checkpoint with published names, read from one of three layouts.

    The layouts are ImageReward's, BLIP's (without the prefix `blip.`), and transformers' BlipForImageTextRetrieval
    (with the towers `vision_model` and `text_encoder`). Heads, projections, momentum copies and text decoders are left
    out.
    """
    if any(key.startswith("vision_model.") for key in state):
        starts = {"vision_model.": "vision.", "text_encoder.": "text."}
        renamed: dict[str, Tensor] = {}
        for old, new in starts.items():
            renamed |= {new + key.removeprefix(old): x for key, x in state.items() if key.startswith(old)}
        state = to_published(renamed)
    elif not any(key.startswith("blip.") for key in state):
        state = {f"blip.{key}": value for key, value in state.items()}
    towers = ("blip.visual_encoder.", "blip.text_encoder.")
    return {key: value for key, value in state.items() if key.startswith(towers) and key not in UNUSED}


def _renamed(key: str, towers: Mapping[str, str], parts: Mapping[str, str], blocks: str) -> str:
    """The name with a new prefix and, in a block of the image tower, a new part after the block number."""
    start = next((x for x in towers if key.startswith(x)), None)
    if start is None:
        return key
    rest = key.removeprefix(start)
    if start == blocks:
        number, _, inner = rest.partition(".")
        part = next((x for x in parts if inner.startswith(x)), "")
        rest = f"{number}.{parts.get(part, '')}{inner.removeprefix(part)}"
    return towers[start] + rest
