"""The baseline: one optimizer step of the released training scripts of Diffusion-DPO and InPO, restated.

Every step decodes, resizes and flips the images, encodes images and captions, and runs a second U-Net as the reference.
Frozen networks are in half precision if the step is, as in the released scripts. SDXL's script keeps the frozen
networks on the host and copies them to the device every step; here they stay on the device, in favour of the baseline.
InPO's script is correct for one pair at a time only, so it accumulates over the pairs of our batch. It inverts with the
policy in ten steps.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffalign.networks.lora import add_lora

Step = Callable[[], None]
LR = 1e-5


class Pairs(Dataset):
    """Pair i: pixels [2, 3, R, R] in [-1, 1], winner first, each flipped independently, and token ids [texts, L]."""

    def __init__(self, file: Path, resolution: int, tokenizers: list[Any]):
        self.folder, self.tokenizers = file.parent, tokenizers
        self.rows = [json.loads(line) for line in file.read_text().splitlines()]
        self.prepare = transforms.Compose(
            [
                transforms.Resize(resolution),
                transforms.CenterCrop(resolution),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        row, pad = self.rows[i], {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        images = [self.prepare(Image.open(self.folder / row[k]).convert("RGB")) for k in ("chosen", "rejected")]
        ids = [words(row["prompt"], **pad).input_ids[0] for words in self.tokenizers]
        return torch.stack(images), torch.stack(ids)


def forever(pairs: Pairs, batch: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches in the order of the data set, prepared ahead by worker processes."""
    order = itertools.cycle(range(len(pairs)))
    batches: Any = ([next(order) for _ in range(batch)] for _ in itertools.count())
    return iter(DataLoader(pairs, batch_sampler=batches, num_workers=workers, pin_memory=bool(workers)))


def inverted(unet: Any, scheduler: Any, x0: Tensor, t: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The released inversion to the first timestep of 1, 101, ... that is at least t, and the implied noise at t."""
    cleaned, x = scheduler.alphas_cumprod, x0
    v = scheduler.config.prediction_type == "v_prediction"
    for g in [g for g in range(-99, 802, 100) if g < t]:
        now, then = cleaned[max(g, 0)], cleaned[g + 100]
        out = unet(x, torch.full((len(x),), g, device=x.device), tokens).sample
        eps = (1 - now).sqrt() * x + now.sqrt() * out if v else out
        clean = now.sqrt() * x - (1 - now).sqrt() * out if v else (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = then.sqrt() * clean + (1 - then).sqrt() * eps
        spread = ((1 - now) / (1 - then) * (1 - then / now)).clamp(min=0).sqrt()
        x = x + 0.1 * spread * torch.randn_like(x)
    a2 = cleaned[t]
    return x, (x - a2.sqrt() * x0) / (1 - a2).sqrt()


class Texts:
    """One text encoder (Stable Diffusion) or two (SDXL) with their tokenizers, frozen."""

    def __init__(self, path: Path, device: torch.device, half: torch.dtype):
        two = (path / "text_encoder_2").exists()
        kinds = {"text_encoder": CLIPTextModel} | ({"text_encoder_2": CLIPTextModelWithProjection} if two else {})
        self.networks = [k.from_pretrained(path, subfolder=n, torch_dtype=half).to(device) for n, k in kinds.items()]
        names = [name.replace("text_encoder", "tokenizer") for name in kinds]
        self.tokenizers = [CLIPTokenizer.from_pretrained(path, subfolder=name) for name in names]
        for network in self.networks:
            network.requires_grad_(False)

    def __call__(self, ids: Tensor, resolution: int) -> tuple[Tensor, dict[str, Tensor] | None]:
        """ids [B, texts, L] -> embeddings [2B, L, D] for winners and losers, and SDXL's added conditions."""
        if len(self.networks) == 1:
            return self.networks[0](ids[:, 0])[0].repeat(2, 1, 1), None
        outputs = [n(ids[:, k], output_hidden_states=True) for k, n in enumerate(self.networks)]
        tokens = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1).repeat(2, 1, 1)
        size = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], device=ids.device)
        return tokens, {"text_embeds": outputs[1].text_embeds.repeat(2, 1), "time_ids": size.repeat(2 * len(ids), 1)}


def released_step(
    path: Path,
    pairs: Path,
    resolution: int,
    batch: int,
    rank: int,
    device: torch.device,
    method: str = "diffusion_dpo",
    *,
    half: torch.dtype = torch.float32,
    checkpointing: bool = False,
    workers: int = 0,
) -> Step:
    """One optimizer step of the released script on the model at `path`.

    rank     LoRA rank; 0 for full fine-tuning
    half     dtype of frozen networks and of autocast; float32 for no autocast
    workers  number of processes that prepare images
    """

    def network(dtype: torch.dtype) -> Any:
        return UNet2DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=dtype).to(device)

    micro = 1 if method == "inpo" else batch
    unet, reference = network(half if rank else torch.float32), network(half).requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(path, subfolder="vae", torch_dtype=half).to(device).requires_grad_(False)
    texts = Texts(path, device, half)
    scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler")
    v = scheduler.config.prediction_type == "v_prediction"
    if rank:
        add_lora(unet, rank=rank, alpha=None, targets=("to_q", "to_k", "to_v", "to_out.0"), seed=0)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    batches = forever(Pairs(pairs, resolution, texts.tokenizers), micro, workers)

    def errors(network: Any, x_t: Tensor, t: Tensor, tokens: Tensor, added: Any, target: Tensor) -> Any:
        out = network(x_t, t, tokens, added_cond_kwargs=added).sample
        return (out.float() - target.float()).pow(2).mean((1, 2, 3)).chunk(2)

    def accumulate() -> None:
        images, ids = (x.to(device, non_blocking=True) for x in next(batches))
        images = images.transpose(0, 1).flatten(0, 1).to(half)  # winners first
        with torch.autocast(device.type, half, enabled=half != torch.float32):
            with torch.no_grad():
                x0 = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
                tokens, added = texts(ids, resolution)
            noise = torch.randn_like(x0).chunk(2)[0].repeat(2, 1, 1, 1)
            t = torch.randint(0, 1000, (micro,), device=device).repeat(2)
            x_t = scheduler.add_noise(x0, noise, t)
            if method == "inpo":
                with torch.no_grad():
                    x_t, noise = inverted(unet, scheduler, x0, int(t[0]), tokens)
            target = scheduler.get_velocity(x0, noise, t) if v else noise
            err_w, err_l = errors(unet, x_t, t, tokens, added, target)
            with torch.no_grad():
                ref_w, ref_l = errors(reference, x_t, t, tokens, added, target)
        loss = -F.logsigmoid(-2500 * ((err_w - err_l) - (ref_w - ref_l))).mean()
        (loss * micro / batch).backward()

    def step() -> None:
        for _ in range(batch // micro):
            accumulate()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
