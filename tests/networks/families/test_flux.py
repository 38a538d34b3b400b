"""FLUX against the stock pipeline: text, packing, the dynamic shift, the guidance embedding, sampling."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from chains import chain
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from diffalign.networks.families.flux import packed, unpacked
from diffalign.networks.loading import load_backbone
from diffalign.types import Cond

CPU = torch.device("cpu")
PROMPTS = ["small red circle left on white", ""]
SETTINGS = {"num_inference_steps": 7, "height": 32, "width": 32, "output_type": "latent"}


def stock(path: Path) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def schnell(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_flux as FLUX.1-schnell: not guidance-distilled, no shift."""
    path = tmp_path_factory.mktemp("schnell") / "pipeline"
    shutil.copytree(tiny_flux, path)
    torch.manual_seed(0)
    config = FluxTransformer2DModel.load_config(tiny_flux, subfolder="transformer")
    FluxTransformer2DModel.from_config(config, guidance_embeds=False).save_pretrained(path / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(path / "scheduler")
    return path


@pytest.mark.parametrize("length", [4, 20])
def test_text_embeddings_equal_the_stock_pipelines(tiny_flux: Path, length: int) -> None:
    """4 tokens truncate the first prompt, 20 pad it."""
    cond = load_backbone(CPU, path=str(tiny_flux), max_sequence_length=length).encode_text(PROMPTS)
    with torch.no_grad():
        tokens, pooled, _ = stock(tiny_flux).encode_prompt(PROMPTS, max_sequence_length=length)
    assert torch.equal(cond.tokens, tokens)
    assert torch.equal(cond.pooled, pooled)
    assert cond.tokens.shape == (2, length, 32)
    assert not torch.allclose(cond.tokens[0], cond.tokens[1], atol=1e-2)


def test_t5_in_float16_keeps_overflowing_layers_in_float32(tiny_flux: Path) -> None:
    """transformers keeps the layers `wo` in float32 while it loads; a cast afterwards would not."""
    backbone = load_backbone(CPU, path=str(tiny_flux), dtype="fp16")
    dtypes = {n.split(".")[-2]: p.dtype for n, p in backbone.text_encoder("text_encoder_2").named_parameters()}
    assert (dtypes["wo"], dtypes["wi"]) == (torch.float32, torch.float16)
    assert backbone.encode_text(PROMPTS).tokens.dtype == torch.float32


def test_packing_is_the_stock_pipeline_s(tiny_flux: Path) -> None:
    x = noise(4, 6)
    theirs = FluxPipeline._pack_latents(x, 2, 16, 4, 6)
    assert torch.equal(packed(x), theirs)
    assert torch.equal(unpacked(theirs, 4, 6), x)
    ours = load_backbone(CPU, path=str(tiny_flux)).pipeline_latents(x)
    assert torch.equal(ours, theirs) and ours.is_contiguous()


def test_position_ids_of_a_non_square_image_equal_the_stock_pipelines(tiny_flux: Path) -> None:
    """Compared through the network's rotary embedding; the stock pipeline passes t / 1000 to the network."""
    backbone, pipeline = load_backbone(CPU, path=str(tiny_flux)), stock(tiny_flux)
    x, cond, seen = noise(4, 6), backbone.encode_text(PROMPTS), {}

    pipeline.transformer.register_forward_pre_hook(lambda *call: seen.update(theirs=call[2]), with_kwargs=True)
    backbone.denoiser.network.register_forward_pre_hook(lambda *call: seen.update(ours=call[2]), with_kwargs=True)
    settings = SETTINGS | {"height": 16, "width": 24, "num_inference_steps": 1}
    pipeline(PROMPTS, latents=packed(x), guidance_scale=3.5, max_sequence_length=256, **settings)
    with torch.no_grad():
        backbone.denoiser(x, torch.ones(2), cond._replace(guidance=torch.tensor([3.5, 3.5])))
    for name in ("img_ids", "txt_ids", "timestep", "guidance", "hidden_states", "encoder_hidden_states"):
        assert torch.equal(seen["ours"][name], seen["theirs"][name]), name


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_sampling_ends_at_the_latents_of_the_stock_pipeline(tiny_flux: Path, guidance: float) -> None:
    """With the guidance scale of the backbone if the cond has none, else with that of the cond."""
    with torch.no_grad():
        theirs = stock(tiny_flux)(
            PROMPTS, latents=packed(noise()), guidance_scale=guidance, max_sequence_length=256, **SETTINGS
        ).images
        for given, embedding in ((None, guidance), (torch.tensor([guidance] * 2), 9.0)):
            backbone = load_backbone(CPU, path=str(tiny_flux), guidance_embedding=embedding)
            cond, grid = backbone.encode_text(PROMPTS)._replace(guidance=given), backbone.grid(7, 32)
            ours = chain(backbone.denoiser, backbone.schedule, cond, noise(), grid)
            assert (packed(ours) - theirs).abs().max() < 1e-4
    assert (ours - noise()).abs().max() > 0.1


def test_the_guidance_embedding_defaults_to_1(tiny_flux: Path) -> None:
    x, t = noise(), torch.tensor([0.3, 0.9])
    out = []
    with torch.no_grad():
        for settings in ({}, {"guidance_embedding": 1.0}, {"guidance_embedding": 3.5}):
            backbone = load_backbone(CPU, path=str(tiny_flux), **settings)
            out.append(backbone.denoiser(x, t, backbone.encode_text(PROMPTS)))
    assert torch.equal(out[0], out[1])
    assert (out[0] - out[2]).abs().max() > 1e-3


def test_schnell_samples_without_guidance_and_without_dynamic_shift(schnell: Path) -> None:
    backbone = load_backbone(CPU, path=str(schnell), guidance_embedding=3.5)
    torch.testing.assert_close(backbone.grid(4, 32), torch.tensor([1.0, 0.75, 0.5, 0.25]))
    with torch.no_grad():
        theirs = stock(schnell)(
            PROMPTS, latents=packed(noise()), guidance_scale=0.0, max_sequence_length=256, **SETTINGS
        ).images
        cond, grid = backbone.encode_text(PROMPTS), backbone.grid(7, 32)
        ours = chain(backbone.denoiser, backbone.schedule, cond, noise(), grid)
    assert (packed(ours) - theirs).abs().max() < 1e-4


def test_the_grid_shifts_more_the_larger_the_image(tiny_flux: Path) -> None:
    """mu = 0.5 + 0.65 (n - 256) / 3840 for n tokens; sigma becomes e^mu / (e^mu + 1/sigma - 1): 1/2, e^mu / (e^mu + 1).

    32 pixels of factor 4 are 16 tokens: mu = 0.459375, sigma = 0.612866; 512 pixels are 4096: mu = 1.15, 0.759511.
    """
    backbone = load_backbone(CPU, path=str(tiny_flux))
    torch.testing.assert_close(backbone.grid(2, 32), torch.tensor([1.0, 0.612866]))
    torch.testing.assert_close(backbone.grid(2, 512), torch.tensor([1.0, 0.759511]))


def test_resolution_must_be_a_multiple_of_the_patch_size(tiny_flux: Path) -> None:
    backbone = load_backbone(CPU, path=str(tiny_flux))
    assert backbone.latent_shape(32) == (16, 8, 8)
    with pytest.raises(ValueError, match="36 is not a multiple of 8"):
        backbone.latent_shape(36)


def test_a_cond_without_pooled_embedding_is_refused(tiny_flux: Path) -> None:
    backbone = load_backbone(CPU, path=str(tiny_flux))
    with pytest.raises(ValueError, match=r"FLUX needs cond\.pooled"):
        backbone.denoiser(noise(), torch.tensor([0.5, 0.5]), Cond(torch.zeros(2, 12, 32)))
