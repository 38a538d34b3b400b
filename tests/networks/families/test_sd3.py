"""SD3 against the stock pipeline: text with and without T5, the shifted grid, sampling."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from chains import chain
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from diffalign.diffusion.steps import guided
from diffalign.networks.loading import encoder_fingerprint, load_backbone
from diffalign.playground import FLOW
from diffalign.types import Cond

CPU = torch.device("cpu")
PROMPTS = ["small red circle left on white", ""]


def stock(path: Path) -> StableDiffusion3Pipeline:
    """Loaded by stock diffusers, which needs an omitted T5 as an argument."""
    index = json.loads((path / "model_index.json").read_text())
    left_out = {} if index["text_encoder_3"][0] else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(path, **left_out).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(channels: int = 16, width: int = 8) -> torch.Tensor:
    return torch.randn(2, channels, width, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def with_t5(tiny_sd3: Path, tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_sd3 with a T5 as wide as its transformer expects, and tiny_flux's tokenizer."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    words = T5TokenizerFast.from_pretrained(tiny_flux, subfolder="tokenizer_2")
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(words), d_model=48, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    path = tmp_path_factory.mktemp("with_t5")
    parts = {"text_encoder_3": T5EncoderModel(config), "tokenizer_3": words}
    StableDiffusion3Pipeline.from_pretrained(tiny_sd3, **parts).save_pretrained(path)
    return path


def check_text(path: Path, length: int) -> Cond:
    cond = load_backbone(CPU, path=str(path), max_sequence_length=length).encode_text(PROMPTS)
    with torch.no_grad():
        tokens, _, pooled, _ = stock(path).encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    assert torch.equal(cond.tokens, tokens)
    assert torch.equal(cond.pooled, pooled)
    return cond


def test_text_without_t5_ends_in_zeros(tiny_sd3: Path) -> None:
    cond = check_text(tiny_sd3, 7)
    assert cond.tokens.shape == (2, 12 + 7, 48)
    assert not cond.tokens[:, 12:].any()


def test_text_with_t5_has_max_sequence_length_t5_tokens(with_t5: Path) -> None:
    """4 tokens truncate the first prompt, 20 pad it."""
    short, long = check_text(with_t5, 4), check_text(with_t5, 20)
    assert (short.tokens.shape[1], long.tokens.shape[1]) == (12 + 4, 12 + 20)
    assert long.tokens[:, 12:].any(dim=-1).all()


def test_t5_null_in_the_index_is_omitted_even_if_its_files_exist(with_t5: Path, tmp_path: Path) -> None:
    path = tmp_path / "pipeline"
    shutil.copytree(with_t5, path)
    index = json.loads((path / "model_index.json").read_text())
    left_out = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (path / "model_index.json").write_text(json.dumps(index | left_out))
    assert not check_text(path, 7).tokens[:, 12:].any()
    assert encoder_fingerprint(path, 7) != encoder_fingerprint(with_t5, 7)


def test_fingerprint_changes_with_t5_its_tokenizer_and_its_length(with_t5: Path, tmp_path: Path) -> None:
    path = tmp_path / "pipeline"
    shutil.copytree(with_t5, path)
    before = load_backbone(CPU, path=str(path), max_sequence_length=7).fingerprint
    assert before == f"{encoder_fingerprint(with_t5, 7)}-float32-float32"
    assert encoder_fingerprint(with_t5, 7) != encoder_fingerprint(with_t5, 8)
    (path / "tokenizer_3" / "spiece.model").write_bytes(b"other pieces")
    changed = encoder_fingerprint(path, 7)
    assert changed != encoder_fingerprint(with_t5, 7)
    with (path / "text_encoder_3" / "config.json").open("a") as file:
        file.write("\n")
    assert encoder_fingerprint(path, 7) != changed


def test_the_grid_is_the_stock_scheduler_s_with_its_shift(tiny_sd3: Path) -> None:
    """Two steps at shift 3: sigma_min = 3 (0.001) / (1 + 2 (0.001)) = 0.002994, shifted again: 0.008929."""
    grid = load_backbone(CPU, path=str(tiny_sd3)).grid(2, 32)
    torch.testing.assert_close(grid, torch.tensor([1.0, 0.0089286]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_sampling_ends_at_the_latents_of_the_stock_pipeline(tiny_sd3: Path, tmp_path: Path, dynamic: bool) -> None:
    path = tmp_path / "pipeline"
    shutil.copytree(tiny_sd3, path)
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic).save_pretrained(path / "scheduler")
    backbone, settings = load_backbone(CPU, path=str(path)), {"height": 32, "width": 32, "output_type": "latent"}
    with torch.no_grad():
        theirs = stock(path)(PROMPTS, latents=noise(), num_inference_steps=7, guidance_scale=1.0, **settings).images
        grid = backbone.grid(7, 32)
        ours = chain(backbone.denoiser, backbone.schedule, backbone.encode_text(PROMPTS), noise(), grid)
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - noise()).abs().max() > 0.1


def test_the_shipped_flow_model_samples_as_the_stock_pipeline() -> None:
    """A trained model, with T5 and guidance 2: from noise to pixels."""
    backbone, pipeline = load_backbone(CPU, path=str(FLOW), max_sequence_length=8), stock(FLOW)
    settings = {"num_inference_steps": 4, "max_sequence_length": 8, "height": 32, "width": 32, "output_type": "pt"}
    with torch.no_grad():
        theirs = pipeline(PROMPTS, latents=noise(4, 16), guidance_scale=2.0, **settings).images
        conds = [backbone.encode_text(p) for p in (PROMPTS, ["", ""])]
        steps = backbone.grid(4, 32)
        guide = partial(guided, backbone.denoiser, uncond=conds[1], scale=2.0)
        latents = chain(guide, backbone.schedule, conds[0], noise(4, 16), steps)
        ours = backbone.decode(latents)
    assert (ours - theirs).abs().max() < 1e-4


def test_a_cond_without_pooled_embedding_and_images_that_are_too_long_are_refused(tiny_sd3: Path) -> None:
    backbone = load_backbone(CPU, path=str(tiny_sd3))
    with pytest.raises(ValueError, match=r"SD3 needs cond\.pooled"):
        backbone.denoiser(noise(), torch.tensor([0.5, 0.5]), Cond(torch.zeros(2, 12, 48)))
    # Eight patches of 2 latents of 4 pixels are all that it has positions for.
    assert backbone.latent_shape((64, 24)) == (16, 16, 6)
    with pytest.raises(ValueError, match=r"'data\.buckets': a side of 72 pixels is longer than this model's 64"):
        backbone.latent_shape((56, 72), "data.buckets")
