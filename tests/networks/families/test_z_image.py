"""Z-Image against the stock pipeline: text, lengths, time, sampling, guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from chains import chain
from stock import images, stock

from diffalign.draws import Draws
from diffalign.networks.cuda_graphs import CudaGraphs
from diffalign.networks.loading import load_backbone
from diffalign.networks.sampler import Sampler
from diffalign.types import Cond

OTHER_LEVELS = pytest.mark.skipif(diffusers.__version__ < "0.37", reason="its pipeline takes one step less")
CPU = torch.device("cpu")
PROMPTS = ["small red circle left on white", ""]


def noise(height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [6, 20, 64])
def test_text_embeddings_equal_the_stock_pipelines(tiny_z_image: Path, length: int) -> None:
    """6 tokens truncate the first prompt, 20 and 64 pad both, to more and less than a multiple of 32."""
    backbone = load_backbone(CPU, path=str(tiny_z_image), max_sequence_length=length)
    cond = backbone.encode_text(PROMPTS)
    with torch.no_grad():
        theirs, _ = stock(tiny_z_image).encode_prompt(list(PROMPTS), CPU, False, max_sequence_length=length)
    assert cond.mask is not None and cond.tokens.shape == (2, length, 16)
    for tokens, mask, wanted in zip(cond.tokens, cond.mask, theirs, strict=True):
        assert mask.tolist() == [1.0] * len(wanted) + [0.0] * (length - len(wanted))
        torch.testing.assert_close(tokens[: len(wanted)], wanted)
        assert not tokens[len(wanted) :].any()
    assert backbone.token_counts(PROMPTS) == (length, [11, 5])  # with the chat template


def test_one_call_of_the_network_gets_what_the_stock_pipeline_gives_it(tiny_z_image: Path) -> None:
    """At a non-square size; the pipeline negates the output."""
    backbone, pipeline = load_backbone(CPU, path=str(tiny_z_image)), stock(tiny_z_image)
    x, cond, seen = noise(4, 6), backbone.encode_text(PROMPTS), {}
    for name, network in (("ours", backbone.denoiser.network), ("theirs", pipeline.transformer)):
        network.register_forward_hook(lambda _, inputs, out, name=name: seen.update({name: (inputs, out)}))
    ends = images(pipeline, list(PROMPTS), 1, latents=x, height=16, width=24, output_type="latent")
    with torch.no_grad():
        velocity = backbone.denoiser(x, torch.ones(2), cond)
    (ours, out), (theirs, wanted) = seen["ours"], seen["theirs"]
    for mine, given in zip(ours, theirs, strict=True):
        torch.testing.assert_close(list(mine), list(given))
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(velocity, -torch.stack(wanted[0])[:, :, 0])
    torch.testing.assert_close(x - velocity, ends)


@OTHER_LEVELS
def test_sampling_ends_at_the_latents_of_the_stock_pipeline(tiny_z_image: Path) -> None:
    backbone = load_backbone(CPU, path=str(tiny_z_image))
    theirs = images(stock(tiny_z_image), list(PROMPTS), 7, latents=noise(), output_type="latent")
    with torch.no_grad():
        ours = chain(backbone.denoiser, backbone.schedule, backbone.encode_text(PROMPTS), noise(), backbone.grid(7, 32))
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - noise()).abs().max() > 0.1


@OTHER_LEVELS
def test_guidance_is_the_stock_pipelines_scale_plus_1(tiny_z_image: Path) -> None:
    backbone = load_backbone(CPU, path=str(tiny_z_image))
    theirs = images(stock(tiny_z_image), list(PROMPTS), 3, latents=noise(), guidance_scale=2.0, output_type="latent")
    sampler = Sampler(backbone, Draws(0), 32, steps=3, guidance=3.0)
    ours = sampler.sample(backbone.denoiser, backbone.encode_text(PROMPTS), ["a", "b"], noise())
    assert (ours - theirs).abs().max() < 1e-4


def test_padding_of_the_cond_changes_nothing(tiny_z_image: Path) -> None:
    """The same prompts, padded to 16 and to 48 tokens."""
    out = []
    with torch.no_grad():
        for length in (16, 48):
            backbone = load_backbone(CPU, path=str(tiny_z_image), max_sequence_length=length)
            out.append(backbone.denoiser(noise(), torch.tensor([0.3, 0.9]), backbone.encode_text(PROMPTS)))
    torch.testing.assert_close(out[0], out[1])


def test_a_network_that_reads_lengths_is_not_recorded(tiny_z_image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording would keep the lengths of the first prompts."""
    backbone = load_backbone(CPU, path=str(tiny_z_image), max_sequence_length=16, cuda_graphs=True)
    monkeypatch.setattr(CudaGraphs, "usable", lambda *_: True)

    def fail(*_: Any) -> None:
        raise AssertionError("recorded")

    monkeypatch.setattr(CudaGraphs, "__call__", fail)
    backbone.denoiser(noise(), torch.tensor([0.3, 0.9]), backbone.encode_text(PROMPTS))


def test_a_cond_without_mask_is_refused(tiny_z_image: Path) -> None:
    backbone = load_backbone(CPU, path=str(tiny_z_image))
    with pytest.raises(ValueError, match=r"Z-Image needs cond\.mask"):
        backbone.denoiser(noise(), torch.tensor([0.5, 0.5]), Cond(torch.zeros(2, 12, 16)))
