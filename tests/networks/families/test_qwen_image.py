"""Qwen-Image against the stock pipeline: latents, text, the network's arguments, sampling, guidance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chains import chain
from stock import images, stock

from diffalign.draws import Draws
from diffalign.networks.families.flux import packed
from diffalign.networks.loading import load_backbone
from diffalign.networks.sampler import Sampler
from diffalign.networks.schedulers import few_step_scheduler
from diffalign.types import Cond

CPU = torch.device("cpu")
PROMPTS = ["small red circle left on white", ""]


def noise(height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(0))


def test_pixels_become_the_stock_autoencoders_latents(tiny_qwen_image: Path) -> None:
    """One frame, each channel with its own mean and deviation."""
    backbone, pipeline = load_backbone(CPU, path=str(tiny_qwen_image)), stock(tiny_qwen_image)
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(pipeline.vae.config[k]).view(4, 1, 1) for k in ("latents_mean", "latents_std"))
    with torch.no_grad():
        theirs = pipeline.vae.encode(pipeline.image_processor.preprocess(pixels)[:, :, None]).latent_dist.mode()
    torch.testing.assert_close(backbone.encode_pixels(pixels), (theirs[:, :, 0] - mean) / std)
    assert backbone.latent_shape(32) == (4, 8, 8)
    with pytest.raises(ValueError, match="36 is not a multiple of 8"):
        backbone.latent_shape(36)


@pytest.mark.parametrize("length", [6, 20])
def test_text_embeddings_equal_the_stock_pipelines(tiny_qwen_image: Path, length: int) -> None:
    """6 tokens truncate the first prompt; its template's prefix is dropped."""
    backbone = load_backbone(CPU, path=str(tiny_qwen_image), max_sequence_length=length)
    cond = backbone.encode_text(PROMPTS)
    with torch.no_grad():
        tokens, mask = stock(tiny_qwen_image).encode_prompt(list(PROMPTS), max_sequence_length=length)
    longest = tokens.shape[1]
    assert cond.mask is not None and cond.tokens.shape == (2, length, 16)
    assert torch.equal(cond.mask[:, :longest], mask.float()) and not cond.mask[:, longest:].any()
    torch.testing.assert_close(cond.tokens[:, :longest], tokens)
    assert not cond.tokens[:, longest:].any()
    assert backbone.token_counts(PROMPTS) == (length, [11, 5])  # with the end of the template


def test_one_call_of_the_network_gets_what_the_stock_pipeline_gives_it(tiny_qwen_image: Path) -> None:
    """The first call at a non-square size; a single step has no levels with `shift_terminal`."""
    backbone, pipeline = load_backbone(CPU, path=str(tiny_qwen_image)), stock(tiny_qwen_image)
    x, cond, seen = noise(4, 6), backbone.encode_text(PROMPTS), {}
    for name, network in (("ours", backbone.denoiser.network), ("theirs", pipeline.transformer)):
        network.register_forward_hook(
            lambda *call, name=name: seen.setdefault(name, call[2:]) and None, with_kwargs=True
        )
    call = {"latents": packed(x), "height": 16, "width": 24, "output_type": "latent"}
    images(pipeline, list(PROMPTS), 2, **call)
    with torch.no_grad():
        backbone.denoiser(x, torch.ones(2), cond)
    (ours, out), (theirs, wanted) = seen["ours"], seen["theirs"]
    torch.testing.assert_close(ours["hidden_states"], theirs["hidden_states"])
    torch.testing.assert_close(ours["timestep"], theirs["timestep"])
    assert ours["img_shapes"] == theirs["img_shapes"]
    torch.testing.assert_close(out[0], wanted[0], atol=1e-4, rtol=0)


def test_sampling_ends_at_the_latents_of_the_stock_pipeline(tiny_qwen_image: Path) -> None:
    backbone = load_backbone(CPU, path=str(tiny_qwen_image))
    theirs = images(stock(tiny_qwen_image), list(PROMPTS), 7, latents=packed(noise()), output_type="latent")
    with torch.no_grad():
        ours = chain(backbone.denoiser, backbone.schedule, backbone.encode_text(PROMPTS), noise(), backbone.grid(7, 32))
    assert (packed(ours) - theirs).abs().max() < 1e-4
    assert (ours - noise()).abs().max() > 0.1


def test_guidance_is_the_stock_pipelines_with_its_rescaling(tiny_qwen_image: Path) -> None:
    backbone = load_backbone(CPU, path=str(tiny_qwen_image))
    call = {"latents": packed(noise()), "output_type": "latent", "true_cfg_scale": 3.0, "negative_prompt": ["", ""]}
    theirs = images(stock(tiny_qwen_image), list(PROMPTS), 3, **call)
    sampler = Sampler(backbone, Draws(0), 32, steps=3, guidance=3.0)
    ours = sampler.sample(backbone.denoiser, backbone.encode_text(PROMPTS), ["a", "b"], noise())
    assert (packed(ours) - theirs).abs().max() < 1e-4
    x, halved = noise(4, 6), noise(4, 6) / 2
    torch.testing.assert_close(backbone.rescaled(halved, x), x)


def test_a_single_step_starts_at_pure_noise(tiny_qwen_image: Path) -> None:
    """Where diffusers divides 0 by 0; a few-step student's own scheduler has no `shift_terminal`."""
    backbone = load_backbone(CPU, path=str(tiny_qwen_image))
    assert backbone.grid(1, 32).tolist() == [1.0]
    assert backbone.grid(3, 32)[-1].item() == pytest.approx(0.02)
    backbone.scheduler_config = few_step_scheduler(backbone.scheduler_config)
    scheduler = backbone.scheduler()
    scheduler.set_timesteps(1, sigmas=[1.0], mu=0.5)
    assert scheduler.config.stochastic_sampling and scheduler.sigmas.tolist() == [1.0, 0.0]


def test_padding_of_the_cond_changes_nothing(tiny_qwen_image: Path) -> None:
    out = []
    with torch.no_grad():
        for length in (16, 48):
            backbone = load_backbone(CPU, path=str(tiny_qwen_image), max_sequence_length=length)
            out.append(backbone.denoiser(noise(), torch.tensor([0.3, 0.9]), backbone.encode_text(PROMPTS)))
    torch.testing.assert_close(out[0], out[1])


def test_a_cond_without_mask_is_refused(tiny_qwen_image: Path) -> None:
    backbone = load_backbone(CPU, path=str(tiny_qwen_image))
    with pytest.raises(ValueError, match=r"Qwen-Image needs cond\.mask"):
        backbone.denoiser(noise(), torch.tensor([0.5, 0.5]), Cond(torch.zeros(2, 12, 16)))
