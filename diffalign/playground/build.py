"""Build of the shipped playground pipeline; `diffalign playground build` reproduces it from scratch.

Three stages, each with a checkpoint so that a killed build resumes: an autoencoder, then the U-Net together with its
text encoder on cached latents, then the diffusers folder and its report card.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffalign.playground.card import best_reachable, report_card
from diffalign.playground.folder import save_pipeline
from diffalign.playground.judge import Judge
from diffalign.playground.world import BACKGROUNDS, COLOURS, PLACES, RADII, SHAPES, imagine, wishes
from reward_models.files import replacing

WORDS = (*RADII, *COLOURS, *SHAPES, *PLACES, "on", *BACKGROUNDS)
LENGTH = 12
BATCH = 32
Clip = TypeVar("Clip", CLIPTextModel, CLIPTextModelWithProjection)


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIPTokenizer with one token per word of the world; other words are split into characters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = _merged([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merged(pieces, merges)
            vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(dict.fromkeys(vocabulary))}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)


def _merged(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one word: the earliest merge first."""
    while found := [m for m in merges if m in pairwise(pieces)]:
        k = next(i for i, pair in enumerate(pairwise(pieces)) if pair == found[0])
        pieces = [*pieces[:k], pieces[k] + pieces[k + 1], *pieces[k + 2 :]]
    return pieces


def autoencoder() -> AutoencoderKL:
    """Factor 2, four latent channels, 0.16 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=1,
        mid_block_add_attention=False,
        latent_channels=4,
        sample_size=32,
    )


def unet() -> UNet2DConditionModel:
    """1.4 M parameters; cross-attention at 8 x 8 and 4 x 4 (only at the lowest resolution, colours stay at chance)."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=64,
    )


def text_encoder(vocabulary: CLIPTokenizer, kind: type[Clip] = CLIPTextModel, *, width: int = 64) -> Clip:
    """79 k parameters, trained with the denoiser. Larger initial embeddings and final gain learn faster."""
    model = kind(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=vocabulary.bos_token_id,
            eos_token_id=vocabulary.eos_token_id,
            pad_token_id=vocabulary.pad_token_id,
        )
    )
    parameters = dict(model.named_parameters())
    for name, scale in (("token_embedding.weight", 0.5), ("position_embedding.weight", 0.25)):
        nn.init.normal_(next(p for n, p in parameters.items() if n.endswith(name)), std=scale)
    nn.init.constant_(next(p for n, p in parameters.items() if n.endswith("final_layer_norm.weight")), 2.0)
    return model


def noise_scheduler() -> DDIMScheduler:
    """Stable Diffusion's betas, v-prediction, steps that start at the last timestep."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def train(
    name: str,
    work: Path,
    modules: dict[str, nn.Module],
    loss: Callable[[int, torch.Generator], Tensor],
    *,
    steps: int,
    lr: float,
    ema_decay: float,
) -> None:
    """Minimise `loss(step, generator)`; at the end the modules have the averaged weights. Resumes from `work/<name>.*`.

    The lr has a warm-up of 100 steps and decays linearly over the last 30 %.
    """
    parameters = [p for m in modules.values() for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    ema, first, checkpoint = EMAModel(parameters, decay=ema_decay), 0, work / f"{name}.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(state[key])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        first = state["step"]
    log = (work / f"{name}.log").open("a")
    started = time.time()
    for step in (bar := tqdm(range(first, steps), initial=first, total=steps, desc=name, mininterval=5)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100, (steps - step) / (0.3 * steps))
        value = loss(step, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        if (step + 1) % 100 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
            log.write(f"{step + 1} {value.item():.5f} {time.time() - started:.0f}s\n")
            log.flush()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            state = {key: m.state_dict() for key, m in modules.items()}
            state |= {"optimizer": optimizer.state_dict(), "ema": ema.state_dict(), "step": step + 1}
            with replacing(checkpoint) as temporary:
                torch.save(state, temporary)
    ema.copy_to(parameters)


def train_autoencoder(work: Path, steps: int, start: StableDiffusionPipeline | None = None) -> AutoencoderKL:
    """L1 + 2 MSE + 1e-6 KL on fresh renders; sets the latent scaling factor from 2,048 of them."""
    torch.manual_seed(0)
    vae = start.vae.train().requires_grad_(True) if start else autoencoder()
    everything = wishes(held_out=False)

    def loss(step: int, g: torch.Generator) -> Tensor:
        chosen = torch.randint(len(everything), (BATCH,), generator=g).tolist()
        pixels = imagine([everything[i] for i in chosen], seed=step).render() * 2 - 1
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=g)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        return F.l1_loss(decoded, pixels) + 2 * F.mse_loss(decoded, pixels) + 1e-6 * posterior.kl().mean()

    lr = 1e-3 if start else 2e-3
    train("autoencoder", work, {"vae": vae}, loss, steps=steps, lr=lr, ema_decay=0.995)
    vae.eval().requires_grad_(False)
    latents = encode(vae, 2048, seed=10**6)[0]
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, n: int, *, seed: int) -> tuple[Tensor, list[str]]:
    """Unscaled latents [n, 4, 16, 16] of n random training scenes, and their captions."""
    everything = wishes(held_out=False)
    chosen = [
        everything[i] for i in torch.randint(len(everything), (n,), generator=torch.Generator().manual_seed(seed))
    ]
    pixels = imagine(chosen, seed=seed).render() * 2 - 1
    means = [vae.encode(chunk).latent_dist.mean for chunk in tqdm(pixels.split(256), desc="encode", disable=n < 4096)]
    return torch.cat(means), [w.caption for w in chosen]


def train_unet(
    work: Path, vae: AutoencoderKL, steps: int, images: int, start: StableDiffusionPipeline | None = None
) -> StableDiffusionPipeline:
    """v-prediction on `images` cached latents, with 10 % caption dropout; trains the text encoder as well."""
    torch.manual_seed(0)
    vocabulary = tokenizer(work / "tokenizer")
    net, text = (start.unet, start.text_encoder) if start else (unet(), text_encoder(vocabulary))
    scheduler = noise_scheduler()
    cache = work / "latents.safetensors"
    latents, words = encode(vae, images, seed=0) if not cache.exists() else (None, None)
    if latents is not None and words is not None:
        ids = vocabulary(words, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        save_file({"latents": latents * vae.config.scaling_factor, "ids": ids}, cache)
    data = load_file(cache)
    empty = vocabulary([""], padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids

    def loss(step: int, g: torch.Generator) -> Tensor:
        chosen = torch.randint(images, (BATCH,), generator=g)
        x0, noise = data["latents"][chosen], torch.randn(BATCH, 4, 16, 16, generator=g)
        # Half uniform, half around t = 620, where shapes are determined; with uniform t they are learned last.
        middle = torch.sigmoid(0.5 + 0.8 * torch.randn(BATCH // 2, generator=g))
        t = (1000 * torch.cat([middle, torch.rand(BATCH // 2, generator=g)])).long()
        ids = torch.where(torch.rand(BATCH, 1, generator=g) < 0.1, empty, data["ids"][chosen])
        out = net(scheduler.add_noise(x0, noise, t), t, text(ids).last_hidden_state).sample
        return F.mse_loss(out, scheduler.get_velocity(x0, noise, t))

    modules = {"unet": net.train(), "text": text.train()}
    train("unet", work, modules, loss, steps=steps, lr=1e-3 if start else 2e-3, ema_decay=0.999)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text.eval(),
        tokenizer=vocabulary,
        unet=net.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build(
    out: Path,
    work: Path,
    *,
    autoencoder_steps: int,
    unet_steps: int,
    images: int,
    samples: int = 512,
    start: Path | None = None,
) -> dict[str, float]:
    """Train the parts missing in `work`, and write the pipeline folder (fp16 safetensors) to `out`.

    start: pipeline folder whose weights are trained further; without it they are random.
    """
    work.mkdir(parents=True, exist_ok=True)
    given = start and StableDiffusionPipeline.from_pretrained(start).to(torch.float32)
    vae = train_autoencoder(work, autoencoder_steps, given)
    held_out = imagine(w := wishes(held_out=True), seed=7).render()
    with torch.no_grad():
        decoded = vae.decode(vae.encode(held_out * 2 - 1).latent_dist.mean).sample.clamp(-1, 1) / 2 + 0.5
    psnr = -10 * math.log10(F.mse_loss(decoded, held_out).item())
    seen = Judge().measure(decoded, [x.caption for x in w])
    card = {
        "psnr": round(psnr, 2),
        "scaling_factor": vae.config.scaling_factor,
        "best_reachable": best_reachable(n=samples),
    }
    card |= {f"decoded_{k}": round(seen[k].mean().item(), 4) for k in ("colour", "shape", "background", "size")}
    print(card, flush=True)
    save_pipeline(train_unet(work, vae, unet_steps, images, given), out)
    pipeline = StableDiffusionPipeline.from_pretrained(out).to(torch.float32)
    card |= {
        "autoencoder_steps": autoencoder_steps,
        "unet_steps": unet_steps,
        "images": images,
        **report_card(pipeline, out.parent / "samples.png", n=samples),
    }
    (out.parent / "build.json").write_text(json.dumps(card, indent=2) + "\n")
    return card
