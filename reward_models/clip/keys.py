"""Conversion of CLIP checkpoints between the layouts of open_clip and transformers.

The weights are the same. transformers splits the fused projection of queries, keys and values into three, and stores
the two last projections transposed, as `nn.Linear` does. The activation is in neither layout: OpenAI's models, and
models fine-tuned from them, need open_clip's `quick_gelu` (transformers' `hidden_act="quick_gelu"`); LAION's models
need exact GELU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_WHOLE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # misspelt by transformers
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
_TOWERS = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
}
_PARTS = {
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.out_proj.": ".attn.out_proj.",
}
_QKV = re.compile(r"\.self_attn\.([qkv])_proj\.")
_DROPPED = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
"""Counters 0, 1, 2, ... that transformers before 4.31 saved."""


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names of transformers' CLIPModel."""
    return any(key.startswith(("text_model.", "vision_model.")) for key in state)


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' CLIPModel with the names and shapes of open_clip's CLIP.

    Other names are kept, so that the strict loader reports them. Raises ValueError if a layer lacks its query, key or
    value.
    """
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        attention = _QKV.search(key)
        if key in _DROPPED:
            continue
        if key in _TRANSPOSED:
            out[_TRANSPOSED[key]] = value.T.contiguous()
        elif attention is None:
            out[_WHOLE.get(key) or _renamed(key, _TOWERS, _PARTS)] = value
        else:
            three = [_QKV.sub(f".self_attn.{x}_proj.", key) for x in "qkv"]
            missing = [x for x in three if x not in state]
            if missing:
                raise ValueError(f"'{missing[0]}' is missing, although '{key}' exists")
            if attention[1] == "q":
                name = _QKV.sub(".attn.in_proj_", key)
                out[_renamed(name, _TOWERS, {})] = torch.cat([state[x] for x in three])
    return out


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of open_clip's CLIP with the names and shapes of transformers' CLIPModel: to_open_clip's inverse."""
    whole, transposed, towers, parts = (_inverse(x) for x in (_WHOLE, _TRANSPOSED, _TOWERS, _PARTS))
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in transposed:
            out[transposed[key]] = value.T.contiguous()
        elif ".attn.in_proj_" in key:
            for x, third in zip("qkv", value.chunk(3), strict=True):
                out[_renamed(key.replace(".attn.in_proj_", f".self_attn.{x}_proj."), towers, {})] = third.clone()
        else:
            out[whole.get(key) or _renamed(key, towers, parts)] = value
    return out


def _renamed(key: str, towers: Mapping[str, str], parts: Mapping[str, str]) -> str:
    """The name of a layer's tensor with a new tower prefix and a new name within the layer."""
    tower = next((x for x in towers if key.startswith(x)), None)
    if tower is None:
        return key
    key = towers[tower] + key.removeprefix(tower)
    part = next((x for x in parts if x in key), None)
    return key if part is None else key.replace(part, parts[part])


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}
