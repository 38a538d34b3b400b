"""Fixtures shared by several test files: tiny real pipelines, rendered pairs, recipes run in this process."""

from __future__ import annotations

import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.utils import save_image

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core already; those they start inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests never touch the user's cache of latents."""
    os.environ["DIFFALIGN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pairs of rendered scenes as JSONL: winners vivid, losers pale."""
    from diffalign.playground.world import captions, imagine, parse

    folder = tmp_path_factory.mktemp("pairs")
    prompts = captions(24, held_out=False)
    scene = imagine([parse(p) for p in prompts], seed=0)
    lines = []
    for name, shift in (("chosen", 0.0), ("rejected", 0.3)):
        images = scene._replace(x=scene.x + 10 * shift).render() * (1 - shift) + 0.5 * shift
        for i, image in enumerate(images):
            save_image(image, folder / f"{name}{i}.png")
    lines = [
        json.dumps({"prompt": p, "chosen": f"chosen{i}.png", "rejected": f"rejected{i}.png"})
        for i, p in enumerate(prompts)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An eps-prediction StableDiffusionPipeline with SD1.5's scheduler settings and random weights."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffalign.playground.build import tokenizer

    folder = tmp_path_factory.mktemp("tiny_sd")
    torch.manual_seed(0)
    words = tokenizer(folder / "words")
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        eos_token_id=words.eos_token_id,
        bos_token_id=words.bos_token_id,
        pad_token_id=words.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=32,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="session")
def recipe() -> Callable[..., None]:
    """recipe("diffusion_dpo", "run.folder=...") runs a train recipe in this process."""

    def call(name: str, *arguments: str) -> None:
        runpy.run_path(str(ROOT / "train" / f"{name}.py"))["main"](list(arguments))

    return call
