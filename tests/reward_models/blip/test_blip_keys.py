"""Conversion of ImageReward's tensor names between the published ones and transformers'."""

from __future__ import annotations

import torch

from reward_models.blip.keys import UNUSED, body_of, to_published, to_transformers
from reward_models.blip.networks import build_towers

VISION = {
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 11,  # two digits
    "num_attention_heads": 3,
}
TEXT = {
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 11,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def _published_names() -> set[str]:
    """The list of keys in the published file, section 4.1 of the specification."""
    both = ("weight", "bias")
    names = {"blip.visual_encoder.cls_token", "blip.visual_encoder.pos_embed"}
    names |= {f"blip.visual_encoder.{x}.{y}" for x in ("patch_embed.proj", "norm") for y in both}
    blocks = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    names |= {f"blip.visual_encoder.blocks.{i}.{x}.{y}" for i in range(11) for x in blocks for y in both}
    names |= {f"blip.text_encoder.embeddings.{x}_embeddings.weight" for x in ("word", "position")}
    names |= {f"blip.text_encoder.embeddings.LayerNorm.{y}" for y in both}
    kinds = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    parts = [f"{a}.{x}" for a in ("attention", "crossattention") for x in kinds]
    parts += ["intermediate.dense", "output.dense", "output.LayerNorm"]
    names |= {f"blip.text_encoder.encoder.layer.{i}.{x}.{y}" for i in range(11) for x in parts for y in both}
    return names | {f"mlp.layers.{i}.{y}" for i in (0, 2, 4, 6, 7) for y in both}


def _ours() -> dict[str, torch.Tensor]:
    vision, text = build_towers(VISION, TEXT)
    state = {f"vision.{k}": x for k, x in vision.state_dict().items()}
    state |= {f"text.{k}": x for k, x in text.state_dict().items()}
    return state | {f"mlp.layers.{i}.{y}": torch.zeros(1) for i in (0, 2, 4, 6, 7) for y in ("weight", "bias")}


def test_the_published_names_are_exactly_those_of_the_modules() -> None:
    state = _ours()
    published = to_published(state)
    assert published.keys() == _published_names()
    again = to_transformers(published)
    assert again.keys() == state.keys()
    assert all(again[key] is state[key] for key in state)
    assert all(published[key].shape == state[to].shape for key, to in zip(published, state, strict=True))


def test_similar_tensor_names_are_mapped_correctly() -> None:
    x = torch.zeros(1)
    names = {
        "blip.visual_encoder.norm.weight": "vision.post_layernorm.weight",
        "blip.visual_encoder.blocks.1.norm1.weight": "vision.encoder.layers.1.layer_norm1.weight",
        "blip.visual_encoder.blocks.11.attn.proj.bias": "vision.encoder.layers.11.self_attn.projection.bias",
        "blip.visual_encoder.blocks.0.mlp.fc1.bias": "vision.encoder.layers.0.mlp.fc1.bias",
        "blip.visual_encoder.patch_embed.proj.weight": "vision.embeddings.patch_embedding.weight",
        "mlp.layers.0.bias": "mlp.layers.0.bias",
        "mlp.aesthetic.layers.0.bias": "mlp.aesthetic.layers.0.bias",
    }
    for published, ours in names.items():
        assert list(to_transformers({published: x})) == [ours] and list(to_published({ours: x})) == [published]


def test_unknown_names_are_kept_and_reported_by_the_strict_loader() -> None:
    x = torch.zeros(1)
    for key in ("blip.visual_encoder.blocks.0.attn.extra", "blip.adapter", "blip.vision_proj.weight", "temp"):
        (renamed,) = to_transformers({key: x})
        assert list(to_published({renamed: x})) == [key]
    assert not any(pattern.startswith(("blip.visual", "mlp", "*")) for pattern in UNUSED)


def test_the_body_is_loaded_from_each_layout() -> None:
    published = to_published(_ours())
    wanted = {key: x for key, x in published.items() if not key.startswith("mlp.")}
    noise = {"blip.vision_proj.weight": torch.zeros(1), "blip.text_encoder.embeddings.position_ids": torch.zeros(1)}
    own = {key.removeprefix("blip."): x for key, x in wanted.items()}
    own |= {"temp": torch.zeros(1), "visual_encoder_m.cls_token": torch.zeros(1), "text_decoder.x": torch.zeros(1)}
    theirs = {"itm_head.weight": torch.zeros(1), "vision_proj.bias": torch.zeros(1)}
    for key, x in to_transformers(wanted).items():
        tower, _, rest = key.partition(".")
        theirs[f"{'vision_model' if tower == 'vision' else 'text_encoder'}.{rest}"] = x
    for state in (published | noise, own, theirs):
        found = body_of(state)
        assert found.keys() == wanted.keys() and all(found[key] is wanted[key] for key in wanted)
