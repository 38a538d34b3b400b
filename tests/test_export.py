"""What a run leaves behind: stock diffusers loads it in a process that cannot import diffalign."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from diffalign.backbones import load_backbone
from diffalign.export import export, own_images
from diffalign.lora import lora_layers

CPU = torch.device("cpu")


def trained(path: Path, **settings):
    """A backbone whose trainable weights are not those it began with."""
    backbone = load_backbone(CPU, path=str(path), **settings)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.denoiser.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    return backbone


def test_lora_export_keeps_alpha_and_gives_the_same_images(tiny_sd: Path, tmp_path: Path) -> None:
    """Rank 2 with alpha 6 scales by 3: a loader that lost alpha would scale by 1 and draw other images."""
    backbone = trained(tiny_sd, lora_rank=2, lora_alpha=6.0)
    message = export(backbone, tmp_path / "export", 32, verify=True)
    assert "verified in a fresh process" in message
    assert "load_lora_weights" in message
    file = next((tmp_path / "export").glob("*.safetensors"))
    with safe_open(file, framework="pt") as weights:
        assert '"unet.lora_alpha": 6' in (weights.metadata() or {})["lora_adapter_metadata"]
    latents = torch.randn(1, *backbone.latent_shape(32), generator=torch.Generator().manual_seed(0))
    right = own_images(backbone, latents, 32)
    for layer in lora_layers(backbone.denoiser):
        layer.scaling["default"] = 1.0
    assert (own_images(backbone, latents, 32) - right).abs().max() > 1e-3


def test_full_export_is_a_whole_pipeline_with_the_same_images(tiny_sd: Path, tmp_path: Path) -> None:
    backbone = trained(tiny_sd)
    assert "from_pretrained" in export(backbone, tmp_path / "export", 32, verify=True)
    assert (tmp_path / "export" / "model_index.json").exists()


@pytest.mark.parametrize(
    ("family", "settings"),
    [("tiny_sd3", {"lora_rank": 2}), ("tiny_sd3", {}), ("tiny_sdxl", {"lora_rank": 2, "dtype": "fp16"})],
    ids=["sd3-without-t5-lora", "sd3-without-t5-full", "sdxl-fp16-lora"],
)
def test_parts_left_out_and_autoencoders_kept_in_float32_are_verified(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, settings: dict
) -> None:
    """Stock diffusers wants to be told of parts that a folder leaves out; SDXL's autoencoder never goes to fp16."""
    backbone = trained(request.getfixturevalue(family), **settings)
    assert "verified in a fresh process" in export(backbone, tmp_path / "export", 32, verify=True)


def test_an_export_with_other_weights_is_refused(tiny_sd: Path, tmp_path: Path, monkeypatch) -> None:
    backbone = trained(tiny_sd)
    monkeypatch.setattr(type(backbone), "save", lambda self, folder: shutil.copytree(tiny_sd, folder))
    with pytest.raises(RuntimeError, match="differs by"):
        export(backbone, tmp_path / "export", 32, verify=True)


def test_export_replaces_the_one_before_as_a_whole(tiny_sd: Path, tmp_path: Path) -> None:
    backbone = trained(tiny_sd, lora_rank=2)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "old").write_text("")
    export(backbone, tmp_path / "export", 32, verify=False)
    assert [p.name for p in (tmp_path / "export").iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert not (tmp_path / "export.tmp").exists()
