"""FLUX.2-klein against the stock pipeline: latents, text, position ids, the dynamic shift, sampling, guidance."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from chains import chain
from stock import images, stock

from diffalign.draws import Draws
from diffalign.networks.loading import load_backbone, supported_families
from diffalign.networks.sampler import Sampler

CPU = torch.device("cpu")
PROMPTS = ["small red circle left on white", ""]


def noise(height: int = 4, width: int = 4) -> torch.Tensor:
    return torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(0))


def test_pixels_become_the_stock_pipelines_latents(tiny_flux2_klein: Path) -> None:
    """Patched and normalised as the stock pipeline does with an image it is given."""
    backbone, pipeline = load_backbone(CPU, path=str(tiny_flux2_klein)), stock(tiny_flux2_klein)
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = pipeline._encode_vae_image(pipeline.image_processor.preprocess(pixels), generator=None)
    torch.testing.assert_close(backbone.encode_pixels(pixels), theirs)
    assert backbone.latent_shape(32) == (16, 4, 4)
    with pytest.raises(ValueError, match="36 is not a multiple of 8"):
        backbone.latent_shape(36)


@pytest.mark.parametrize("length", [6, 20])
def test_text_embeddings_equal_the_stock_pipelines(tiny_flux2_klein: Path, length: int) -> None:
    """6 tokens truncate the first prompt, 20 pad it."""
    cond = load_backbone(CPU, path=str(tiny_flux2_klein), max_sequence_length=length).encode_text(PROMPTS)
    with torch.no_grad():
        tokens, _ = stock(tiny_flux2_klein).encode_prompt(list(PROMPTS), max_sequence_length=length)
    torch.testing.assert_close(cond.tokens, tokens)
    assert cond.tokens.shape == (2, length, 48) and cond.mask is None


def test_one_call_of_the_network_gets_what_the_stock_pipeline_gives_it(tiny_flux2_klein: Path) -> None:
    """At a non-square size."""
    backbone, pipeline = load_backbone(CPU, path=str(tiny_flux2_klein)), stock(tiny_flux2_klein)
    x, cond, seen = noise(2, 3), backbone.encode_text(PROMPTS), {}
    pipeline.transformer.register_forward_pre_hook(lambda *call: seen.update(theirs=call[2]), with_kwargs=True)
    backbone.denoiser.network.register_forward_pre_hook(lambda *call: seen.update(ours=call[2]), with_kwargs=True)
    call = {"latents": x, "height": 16, "width": 24, "max_sequence_length": 256, "output_type": "latent"}
    images(pipeline, list(PROMPTS), 1, **call)
    with torch.no_grad():
        backbone.denoiser(x, torch.ones(2), cond)
    for name in ("timestep", "hidden_states", "encoder_hidden_states"):
        torch.testing.assert_close(seen["ours"][name], seen["theirs"][name])
    for name in ("img_ids", "txt_ids"):
        assert torch.equal(seen["ours"][name], seen["theirs"][name][0]), name
    assert seen["ours"]["guidance"] is seen["theirs"]["guidance"] is None


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [3, 7])
def test_sampling_ends_at_the_latents_of_the_stock_pipeline(
    tiny_flux2_klein: Path, steps: int, guidance: float
) -> None:
    """The shift depends on the number of steps. The stock pipeline returns the autoencoder's own latents."""
    backbone = load_backbone(CPU, path=str(tiny_flux2_klein))
    call = {"latents": noise(), "guidance_scale": guidance, "max_sequence_length": 256, "output_type": "latent"}
    theirs = images(stock(tiny_flux2_klein), list(PROMPTS), steps, **call)
    cond = backbone.encode_text(PROMPTS)
    sampler = Sampler(backbone, Draws(0), 32, steps=steps, guidance=guidance)
    ours = sampler.sample(backbone.denoiser, cond, ["a", "b"], noise())
    shift, scale = backbone.scaling
    own = torch.nn.functional.pixel_shuffle(ours / scale + shift, 2)
    assert (own - theirs).abs().max() < 1e-4
    if guidance == 1:
        with torch.no_grad():
            again = chain(backbone.denoiser, backbone.schedule, cond, noise(), backbone.grid(steps, 32))
        torch.testing.assert_close(again, ours)
    assert (ours - noise()).abs().max() > 0.1


def test_whether_a_model_is_distilled_is_kept_in_the_export(tiny_flux2_klein: Path, tmp_path: Path) -> None:
    from diffalign.networks.export import save

    path = tmp_path / "distilled"
    shutil.copytree(tiny_flux2_klein, path)
    index = json.loads((path / "model_index.json").read_text()) | {"is_distilled": True}
    (path / "model_index.json").write_text(json.dumps(index))
    save(load_backbone(CPU, path=str(path)), tmp_path / "export")
    assert stock(tmp_path / "export").config.is_distilled


def test_families_newer_than_the_installed_diffusers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffalign.networks.families.flux2 import Flux2KleinBackbone

    supported_families.cache_clear()
    monkeypatch.setattr(Flux2KleinBackbone, "pipeline_class", None)
    try:
        found = supported_families()
    finally:
        supported_families.cache_clear()
    assert "Flux2KleinPipeline" not in found and "FluxPipeline" in found
    assert hasattr(diffusers, "FluxPipeline")
