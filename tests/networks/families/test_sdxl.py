"""SDXL against the stock pipeline: text, sampling, size conditions, and float16 overflow of the autoencoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from chains import chain
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from diffalign.diffusion.schedule import Prediction
from diffalign.networks.loading import load_backbone
from diffalign.types import Cond

CPU = torch.device("cpu")
PROMPTS = ["small red circle left on white", ""]


def stock(path: Path, **config: object) -> StableDiffusionXLPipeline:
    """The stock pipeline with DDIM on a trailing grid."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(path, add_watermarker=False)
    settings = {"timestep_spacing": "trailing", "clip_sample": False} | config
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(0))


def test_text_embeddings_equal_the_stock_pipelines(tiny_sdxl: Path) -> None:
    cond = load_backbone(CPU, path=str(tiny_sdxl)).encode_text(PROMPTS)
    with torch.no_grad():
        tokens, _, pooled, _ = stock(tiny_sdxl).encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert torch.equal(cond.tokens, tokens)
    assert torch.equal(cond.pooled, pooled)
    assert cond.size is None
    assert not torch.allclose(cond.tokens[0], cond.tokens[1], atol=1e-2)


def test_the_empty_prompt_is_encoded_as_an_empty_negative_prompt(tiny_sdxl: Path) -> None:
    """It is not replaced by the zeros that the stock pipeline uses without a negative prompt."""
    pipeline, empty = stock(tiny_sdxl), load_backbone(CPU, path=str(tiny_sdxl)).encode_text([""])
    with torch.no_grad():
        _, written, _, written_pooled = pipeline.encode_prompt("red", negative_prompt="")
        _, left_out, _, _ = pipeline.encode_prompt("red")
    assert torch.equal(empty.tokens, written)
    assert torch.equal(empty.pooled, written_pooled)
    assert not left_out.any()


@pytest.mark.parametrize("prediction", Prediction.__members__.values())
def test_sampling_ends_at_the_latents_of_the_stock_pipeline(
    tiny_sdxl: Path, tmp_path: Path, prediction: Prediction
) -> None:
    """Both prediction types; a cond without size means the stock pipeline's default, a full image."""
    path = tmp_path / "pipeline"
    shutil.copytree(tiny_sdxl, path)
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": prediction.value}))
    if prediction is Prediction.FLOW:
        with pytest.raises(ValueError, match="prediction_type must be epsilon or v_prediction"):
            load_backbone(CPU, path=str(path))
        return
    backbone = load_backbone(CPU, path=str(path))
    settings = {"num_inference_steps": 5, "guidance_scale": 1.0, "height": 32, "width": 32, "output_type": "latent"}
    with torch.no_grad():
        theirs = stock(path, timestep_spacing="leading")(PROMPTS, latents=noise(), **settings).images
        grid = backbone.grid(5, 32)
        ours = chain(backbone.denoiser, backbone.schedule, backbone.encode_text(PROMPTS), noise(), grid)
    assert (ours - theirs).abs().max() < 1e-4


def test_size_conditions_are_the_stock_pipeline_s(tiny_sdxl: Path) -> None:
    """A size for each image; None is the size of x_t in pixels (height first), and not that of another shape."""
    backbone, pipeline = load_backbone(CPU, path=str(tiny_sdxl)), stock(tiny_sdxl)
    cond, t, x = backbone.encode_text(PROMPTS), torch.tensor([999, 999]), noise(8, 16)
    seen = []
    pipeline.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    common = {"num_inference_steps": 1, "guidance_scale": 1.0, "latents": x, "height": 32, "width": 64}
    pipeline(PROMPTS, output_type="latent", **common)
    given = {"original_size": (640, 480), "crops_coords_top_left": (0, 80), "target_size": (512, 256)}
    pipeline(PROMPTS, output_type="latent", **common, **given)
    with torch.no_grad():
        default, explicit, cropped = (
            backbone.denoiser(x, t, cond._replace(size=size)) for size in (None, seen[0], seen[1])
        )
        half = backbone.denoiser(x, t, cond._replace(size=torch.stack([seen[0][0], seen[1][1]])))
    assert seen[0].tolist() == [[32, 64, 0, 0, 32, 64]] * 2
    assert torch.equal(default, explicit)
    assert (default - cropped).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(half, torch.stack([explicit[0], cropped[1]]))


def test_sizes_reach_a_bfloat16_network_unrounded(tiny_sdxl: Path) -> None:
    """The nearest bfloat16 of 1023 is 1024."""
    backbone = load_backbone(CPU, path=str(tiny_sdxl), dtype="bf16", lora_rank=2)
    cond, sizes, seen = backbone.encode_text(PROMPTS), torch.tensor([[1023.0, 769, 1, 0, 1023, 1023]] * 2), {}
    backbone.denoiser.network.register_forward_pre_hook(lambda *call: seen.update(call[2]), with_kwargs=True)
    backbone.denoiser(noise(), torch.tensor([1, 1]), cond._replace(size=sizes))
    assert torch.equal(seen["added_cond_kwargs"]["time_ids"], sizes)


@pytest.mark.parametrize(
    ("dtype", "upcast", "expected"),
    [
        ("fp32", True, torch.float32),
        ("fp16", True, torch.float32),
        ("fp16", False, torch.float16),
        ("bf16", True, torch.bfloat16),
        ("bf16", False, torch.bfloat16),
    ],
)
def test_only_the_fp16_fix_autoencoder_runs_in_float16(
    tiny_sdxl: Path, tmp_path: Path, dtype: str, upcast: bool, expected: torch.dtype
) -> None:
    path = tmp_path / "pipeline"
    shutil.copytree(tiny_sdxl, path)
    file = path / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"force_upcast": upcast}))
    backbone = load_backbone(CPU, path=str(path), dtype=dtype)
    assert backbone.vae.dtype == expected
    assert backbone.text_encoder("text_encoder_2").dtype == backbone.dtype
    latents = backbone.encode_pixels(torch.rand(1, 3, 32, 32))
    assert latents.dtype == backbone.decode(latents).dtype == torch.float32
    cond = backbone.encode_text(["red"])
    assert cond.tokens.dtype == cond.pooled.dtype == torch.float32


def test_a_cond_without_pooled_embedding_is_refused(tiny_sdxl: Path) -> None:
    backbone = load_backbone(CPU, path=str(tiny_sdxl))
    with pytest.raises(ValueError, match=r"SDXL needs cond\.pooled"):
        backbone.denoiser(noise(), torch.tensor([1, 1]), Cond(torch.zeros(2, 12, 40)))
