"""Models of real sizes with random weights, created on the device, and data for them, for speed benchmarks.

On a GPU SD1.5 takes seconds and SDXL ten seconds; on a CPU minutes, so use `tiny` there: the same classes, small.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffalign.playground import BASE, PAIRS
from reward_models.clip.scorers import CLIPScorer
from reward_models.files import replacing_folder


class Size(NamedTuple):
    """Configs of a pipeline's parts, and its image width in pixels. texts: (hidden size, layers, heads) per encoder."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    texts: tuple[tuple[int, int, int], ...]
    resolution: int


def _blocks(*attends: bool) -> dict[str, tuple[str, ...]]:
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends))
    return {"down_block_types": down, "up_block_types": up}


ADDED = {"use_linear_projection": True, "addition_embed_type": "text_time"}  # SDXL's size conditions
SDXL = _blocks(False, True, True) | {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 768 + 1280,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
}
SMALL = _blocks(False, True) | {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}
SMALL_SDXL = {
    "cross_attention_dim": 16 + 24,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 24,
}
DEEP = SDXL | {  # SDXL's layers with few channels
    "sample_size": 8,
    "block_out_channels": (8, 8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": (1, 1, 2),
}
SD3 = {  # 3.5 medium
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 768 + 1280,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SMALL_SD3 = SD3 | {
    "sample_size": 8,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": 48,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 16 + 24,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
SMALL_VAE = {"block_out_channels": (4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
SDXL_VAE = {"scaling_factor": 0.13025}
SD3_VAE = {"scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False}
SIZES = {
    "sd15": Size({"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, VAE, ((768, 12, 12),), 512),
    "sdxl": Size(SDXL | ADDED, VAE | SDXL_VAE, ((768, 12, 12), (1280, 32, 20)), 1024),
    "sd3": Size(SD3, VAE | SD3_VAE, ((768, 12, 12), (1280, 32, 20)), 512),
    "sd3, tiny": Size(SMALL_SD3, SMALL_VAE | SD3_VAE, ((16, 1, 2), (24, 1, 2)), 32),
    "sd15, tiny": Size(SMALL | {"cross_attention_dim": 16}, SMALL_VAE, ((16, 1, 2),), 32),
    "deep, tiny": Size(DEEP | SMALL_SDXL | ADDED, SMALL_VAE | SDXL_VAE, ((16, 1, 2), (24, 1, 2)), 64),
    "sdxl, tiny": Size(SMALL | SMALL_SDXL | ADDED, SMALL_VAE | SDXL_VAE, ((16, 1, 2), (24, 1, 2)), 64),
}
LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def pipeline_folder(name: str, scratch: Path, device: torch.device) -> Path:
    """A diffusers folder in bfloat16 of a size in SIZES, created in `scratch` if missing."""
    folder = scratch / name.replace(", ", "-")
    if not folder.exists():
        torch.manual_seed(0)
        with replacing_folder(folder) as made:
            make_pipeline(SIZES[name], device).save_pretrained(made)
    return folder


def make_pipeline(size: Size, device: torch.device) -> Any:
    """The stock pipeline with random networks in bfloat16; only the networks are created on the device."""
    words = CLIPTokenizer.from_pretrained(BASE, subfolder="tokenizer")
    words.model_max_length = 77
    count = len(size.vae["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * count, "up_block_types": ("UpDecoderBlock2D",) * count}
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    sd3 = "joint_attention_dim" in size.unet
    name, network = ("transformer", SD3Transformer2DModel) if sd3 else ("unet", UNet2DConditionModel)
    kinds |= {"text_encoder": CLIPTextModelWithProjection} if sd3 else {}
    with torch.device(device):  # created in float32; each is converted to bfloat16 before the next is created
        parts: dict[str, Any] = {name: network(**size.unet).to(torch.bfloat16)}
        parts["vae"] = AutoencoderKL(**size.vae, **blocks, latent_channels=16 if sd3 else 4).to(torch.bfloat16)
        parts |= {name: _text(shape, kinds[name], words) for name, shape in zip(kinds, size.texts, strict=False)}
    parts["tokenizer"] = words
    if sd3:  # without T5, whose 4.8 B weights only encode the prompts before training
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        none = {"text_encoder_3": None, "tokenizer_3": None}
        return StableDiffusion3Pipeline(**parts, tokenizer_2=words, scheduler=scheduler, **none)
    if len(size.texts) == 1:
        none: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(**parts, scheduler=PNDMScheduler(**LEVELS, skip_prk_steps=True), **none)
    scheduler = EulerDiscreteScheduler(**LEVELS, timestep_spacing="leading")
    return StableDiffusionXLPipeline(**parts, tokenizer_2=words, scheduler=scheduler, add_watermarker=False)


def _text(shape: tuple[int, int, int], kind: Any, words: Any) -> Any:
    width, layers, heads = shape
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    special = {name: getattr(words, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    text = CLIPTextConfig(**sizes, **special, num_hidden_layers=layers, num_attention_heads=heads)
    return kind(text).to(torch.bfloat16)


def vit_h() -> CLIPScorer:
    """A random scorer of the size of HPSv2 and PickScore: `random_models:vit_h` for `load_scorer`."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return CLIPScorer("ViT-H-14", unit="raw")


def vit_tiny() -> CLIPScorer:
    """A CLIP scorer with one layer, fast on a CPU."""
    return CLIPScorer(TINY_CLIP, unit="raw")


def playground_pairs(folder: Path, size: int, count: int = 64) -> Path:
    """Some of the shipped pairs as JPEG files of `size` pixels with a JSONL file, created if missing."""
    done = folder / "pairs.jsonl"
    if done.exists():
        return done
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, row in enumerate(pq.read_table(PAIRS).slice(0, count).to_pylist()):
        for name, column in (("w", "jpg_0"), ("l", "jpg_1")):
            image = Image.open(io.BytesIO(row[column])).resize((size, size), Image.Resampling.BICUBIC)
            image.save(folder / f"{name}{i}.jpg", quality=92)
        lines.append(json.dumps({"prompt": row["caption"], "chosen": f"w{i}.jpg", "rejected": f"l{i}.jpg"}))
    done.write_text("\n".join(lines) + "\n")
    return done
