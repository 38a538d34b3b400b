"""Build of the shipped flow-matching pipeline; `diffalign playground build --model flow` reproduces it.

A tiny StableDiffusion3Pipeline around the shipped autoencoder: a multimodal diffusion transformer and its two CLIP text
encoders are trained together, from scratch, on cached latents. Its T5 outputs exact zeros, as the stock pipeline does
without T5. (A folder without T5 would require `text_encoder_3=None, tokenizer_3=None` in every `from_pretrained`.)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from diffalign.playground.build import BATCH, LENGTH, WORDS, encode, report_card, text_encoder, tokenizer, train
from diffalign.playground.folder import save_pipeline

TEXT_WIDTHS = (48, 64)
T5_LENGTH = 8
"""`max_sequence_length` of most training steps and of the recipes; long enough for every caption of the world."""
T5_LENGTH_DEFAULT = 256
"""The stock pipeline's own `max_sequence_length`; every `T5_DEFAULT_EVERY`-th step trains with it."""
T5_DEFAULT_EVERY = 12


def transformer() -> SD3Transformer2DModel:
    """2.0 M parameters, width 96, 64 image tokens."""
    net = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        num_attention_heads=6,
        attention_head_dim=16,
        joint_attention_dim=sum(TEXT_WIDTHS),
        caption_projection_dim=96,
        pooled_projection_dim=sum(TEXT_WIDTHS),
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    # Initially every block is the identity and the output 0; diffusers does not initialise so.
    last = [m.linear for name, m in net.named_modules() if name.endswith(("norm1", "norm1_context", "norm_out"))]
    for linear in (*last, net.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return net


def embed(texts: tuple[CLIPTextModelWithProjection, ...], ids: Tensor, zeros: int) -> tuple[Tensor, Tensor]:
    """Token embeddings [B, LENGTH + zeros, D] and pooled ones [B, D], as in StableDiffusion3Pipeline."""
    outputs = [text(ids, output_hidden_states=True) for text in texts]
    tokens = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
    return F.pad(tokens, (0, 0, 0, zeros)), torch.cat([out.text_embeds for out in outputs], dim=-1)


def silent_t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    """A T5 of 6 k parameters whose output is 0 at every token, and its tokenizer of the world's words."""
    vocabulary = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in WORDS))]
    config = T5Config(vocab_size=len(vocabulary), d_model=sum(TEXT_WIDTHS), d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    model = T5EncoderModel(config)
    nn.init.zeros_(model.encoder.final_layer_norm.weight)
    words = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    words.decoder = decoders.Metaspace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return model.eval(), T5TokenizerFast(tokenizer_object=words, extra_ids=0)


def shifted_autoencoder(base: Path, images: int) -> AutoencoderKL:
    """The autoencoder of `base`, with latents shifted and scaled to mean 0 and std 1 (over at most 2,048 latents)."""
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae").float().eval().requires_grad_(False)
    latents = encode(vae, min(images, 2048), seed=10**6)[0]
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )
    return vae


def cached(work: Path, vae: AutoencoderKL, vocabulary: CLIPTokenizer, images: int) -> dict[str, Tensor]:
    """`latents` [images, 4, 16, 16], shifted and scaled, and the caption `ids` [images, LENGTH]."""
    cache = work / "flow_latents.safetensors"
    if not cache.exists():
        latents, words = encode(vae, images, seed=0)
        ids = vocabulary(words, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        save_file({"latents": latents, "ids": ids}, cache)
    return load_file(cache)


def sigmas(n: int, g: torch.Generator) -> Tensor:
    """n noise levels in (0, 1): half uniform, half around 0.69, where shapes are determined."""
    middle = torch.sigmoid(0.8 + 0.8 * torch.randn(n // 2, generator=g))
    return torch.cat([middle, torch.rand(n - n // 2, generator=g)])


def train_flow(
    work: Path, base: Path, *, steps: int, images: int, start: Path | None = None
) -> StableDiffusion3Pipeline:
    """Velocity matching (eps - x0) on `images` cached latents, with 10 % caption dropout and text encoders.

    start: pipeline folder whose transformer and text encoders are trained further; without it they are random.
    """
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    vae, vocabulary = shifted_autoencoder(base, images), tokenizer(work / "tokenizer")
    if start:
        given = StableDiffusion3Pipeline.from_pretrained(start).to(torch.float32)
        net, texts = given.transformer.train(), (given.text_encoder.train(), given.text_encoder_2.train())
    else:
        net = transformer()
        texts = tuple(text_encoder(vocabulary, CLIPTextModelWithProjection, width=width) for width in TEXT_WIDTHS)
    data = cached(work, vae, vocabulary, images)
    empty = vocabulary([""], padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids

    def loss(step: int, g: torch.Generator) -> Tensor:
        # A context of 256 zero tokens is expensive, so those steps use fewer images.
        zeros, n = (T5_LENGTH_DEFAULT, BATCH // 4) if step % T5_DEFAULT_EVERY == 0 else (T5_LENGTH, BATCH)
        chosen = torch.randint(images, (n,), generator=g)
        x0, noise, sigma = data["latents"][chosen], torch.randn(n, 4, 16, 16, generator=g), sigmas(n, g)
        ids = torch.where(torch.rand(n, 1, generator=g) < 0.1, empty, data["ids"][chosen])
        noisy = torch.lerp(x0, noise, sigma.view(-1, 1, 1, 1))
        tokens, pooled = embed(texts, ids, zeros)
        out = net(noisy, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=1000 * sigma).sample
        return F.mse_loss(out, noise - x0)

    modules = {"transformer": net, "text": texts[0], "text_2": texts[1]}
    train("flow", work, modules, loss, steps=steps, lr=1e-3 if start else 2e-3, ema_decay=0.999)
    t5, t5_tokenizer = silent_t5()
    return StableDiffusion3Pipeline(
        transformer=net.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=texts[0].eval(),
        tokenizer=vocabulary,
        text_encoder_2=texts[1].eval(),
        tokenizer_2=vocabulary,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def build_flow(
    out: Path, work: Path, base: Path, *, steps: int, images: int, samples: int = 512, start: Path | None = None
) -> dict[str, object]:
    """Train the parts missing in `work`, write the pipeline folder (fp16 safetensors) to `out`, and evaluate it."""
    pipeline = train_flow(work, base, steps=steps, images=images, start=start)
    parts = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
    parameters = {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in parts}
    save_pipeline(pipeline, out)
    pipeline = StableDiffusion3Pipeline.from_pretrained(out).to(torch.float32)
    cards = [
        report_card(pipeline, out.parent / "flow_samples.png", n=samples, max_sequence_length=T5_LENGTH),
        report_card(pipeline, n=samples, max_sequence_length=T5_LENGTH_DEFAULT),
    ]
    card = {"parameters": parameters, "steps": steps, "images": images, "measured": cards}
    (out.parent / "flow_build.json").write_text(json.dumps(card, indent=2) + "\n")
    return card
