"""Conversion of CLIP checkpoints between open_clip and transformers: same weights, same features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from reward_models.clip.keys import is_transformers, to_open_clip, to_transformers


def _open_clip(quick_gelu: bool) -> open_clip.CLIP:
    torch.manual_seed(0)
    vision = {"image_size": 28, "layers": 3, "width": 48, "head_width": 16, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 120, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(24, vision, text, quick_gelu=quick_gelu).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # randomise zeros and ones, so that each tensor affects the result
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _transformers(quick_gelu: bool) -> CLIPModel:
    torch.manual_seed(1)
    act = "quick_gelu" if quick_gelu else "gelu"
    text: dict[str, Any] = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 77, "hidden_act": act, "eos_token_id": 2}
    vision: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
    }
    vision |= {"image_size": 28, "patch_size": 14, "hidden_act": act}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()


def _projected(features: object) -> Tensor:
    """transformers before 5 returns the tensor itself."""
    return features if isinstance(features, Tensor) else features.pooler_output  # type: ignore[attr-defined]


@pytest.fixture(params=[False, True], ids=["gelu", "quick_gelu"])
def models(request: pytest.FixtureRequest) -> Iterator[tuple[open_clip.CLIP, CLIPModel]]:
    yield _open_clip(request.param), _transformers(request.param)


def _assert_same_features(one: open_clip.CLIP, other: CLIPModel) -> None:
    """The end of a text is its largest id, 119."""
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    tokens = torch.randint(1, 118, (3, 77), generator=torch.Generator().manual_seed(3))
    tokens[[0, 1, 2], [5, 76, 40]] = 119
    with torch.no_grad():
        torch.testing.assert_close(one.encode_image(pixels), _projected(other.get_image_features(pixels)), **CLOSE)
        torch.testing.assert_close(one.encode_text(tokens), _projected(other.get_text_features(tokens)), **CLOSE)
        assert torch.equal(one.logit_scale, other.logit_scale)


CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


def test_open_clip_to_transformers(models: tuple[open_clip.CLIP, CLIPModel]) -> None:
    one, other = models
    state = to_transformers(one.state_dict())
    assert is_transformers(state) and not is_transformers(one.state_dict())
    other.load_state_dict(state, strict=True)
    _assert_same_features(one, other)


def test_transformers_to_open_clip(models: tuple[open_clip.CLIP, CLIPModel]) -> None:
    one, other = models
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}  # as transformers 4.30 saved them
    one.load_state_dict(to_open_clip(other.state_dict() | ids), strict=True)
    _assert_same_features(one, other)


def test_conversion_and_back_is_bit_for_bit(models: tuple[open_clip.CLIP, CLIPModel]) -> None:
    for state, there, back in (
        (models[0].state_dict(), to_transformers, to_open_clip),
        (models[1].state_dict(), to_open_clip, to_transformers),
    ):
        returned = back(there(state))
        assert returned.keys() == state.keys()
        assert all(torch.equal(returned[key], state[key]) for key in state)


def test_conversion_keeps_unknown_tensors_and_reports_missing_ones() -> None:
    state = _transformers(False).state_dict()
    del state["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(ValueError, match=r"'vision_model\.encoder\.layers\.1\.self_attn\.k_proj\.bias' is missing"):
        to_open_clip(state)
    assert "text_model.adapter.weight" in to_open_clip({"text_model.adapter.weight": torch.zeros(1)})


def test_full_size_models_convert_to_each_others_shapes() -> None:
    """On the meta device. LAION's ViT-H/14, the architecture of HPSv2 and PickScore, has 986,109,441 parameters."""
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    with torch.device("meta"):
        one = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
        other = CLIPModel(CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 14}, projection_dim=1024))
    assert sum(p.numel() for p in one.parameters()) == 986_109_441
    shapes = {key: value.shape for key, value in one.state_dict().items()}
    assert {key: value.shape for key, value in to_open_clip(other.state_dict()).items()} == shapes
    back = {key: value.shape for key, value in to_transformers(one.state_dict()).items()}
    assert back == {key: value.shape for key, value in other.state_dict().items()}
