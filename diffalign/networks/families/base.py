"""What every model family looks like from outside: one trainable denoiser, everything else frozen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from diffalign.diffusion.schedule import Schedule
from diffalign.networks.placement import Placement, Role, as_input, free_memory, place, precision
from diffalign.types import Cond
from reward_models.files import read_json

DECODED_PIXELS = 4 * 512 * 512
"""How many the autoencoder decodes at a time where no gradient is wanted."""


class Denoiser(nn.Module, ABC):
    """The trainable network in one common shape. `network` is the diffusers model it wraps."""

    network: Any

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """[B, C, h, w], t [B], cond of batch B -> the network's prediction [B, C, h, w], float32."""
        with precision(self, x_t.device):
            return self.predict(x_t, t, cond).float()

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """As forward, in any precision."""


def tokenizer_of(text_encoder: str) -> str:
    """The name in the pipeline of a text encoder's tokenizer."""
    return text_encoder.replace("text_encoder", "tokenizer")


class Source(NamedTuple):
    """What a backbone is made from.

    path                 the diffusers folder
    fingerprint          of its encoders' files and settings
    placement            of its networks
    max_sequence_length  tokens of a prompt in T5, where the family has one
    guidance_embedding   what a guidance-distilled network is told where a Cond has no guidance
    """

    path: Path
    fingerprint: str
    placement: Placement
    max_sequence_length: int
    guidance_embedding: float


class Backbone(ABC):
    """A pretrained text-to-image pipeline taken apart. Encoders and decoder load when first used, `release` drops them.

    denoiser     the trainable network
    schedule     its noise schedule
    path         the diffusers folder it came from
    dtype        of the weights that never train
    index        model_index.json: which parts there are
    scheduler_config  of the stock pipeline's scheduler; change it and what is exported samples by another one

    A family says what its parts are: the class of the pipeline (`load_backbone` finds the family by its name) and of
    the network, the network's name in the pipeline, each text encoder's name with its class and its tokenizer's, and
    what makes `pipeline` leave a part out.
    """

    pipeline_class: ClassVar[Any]
    network_class: ClassVar[Any]
    network_name: ClassVar[str]
    text_classes: ClassVar[dict[str, tuple[Any, Any]]]
    left_out: ClassVar[dict[str, Any]] = {}

    denoiser: Denoiser
    schedule: Schedule

    def __init__(self, source: Source):
        self.source = source
        self.path, self.device, self.dtype = source.path, source.placement.device, source.placement.frozen_dtype
        self.vae_config = self._json("vae/config.json")
        self.scheduler_config = self._json("scheduler/scheduler_config.json")
        self.index = self._json("model_index.json")
        # A folder may leave an encoder out: its entry is then null, even where its files lie there.
        self._tokenizers = {
            name: tokenizer.from_pretrained(self.path, subfolder=tokenizer_of(name))
            for name, (_, tokenizer) in self.text_classes.items()
            if self.index.get(name, [None])[0] is not None
        }
        self._parts: dict[str, Any] = {}

    @property
    def fingerprint(self) -> str:
        """Changes with the weights, the settings and the dtypes that decide latents and text embeddings."""
        return "-".join([self.source.fingerprint, self.dtypes["vae"], self.dtypes["default"]])

    @property
    def dtypes(self) -> dict[str, str]:
        """What the frozen parts are kept in, by name, as `from_pretrained` takes it: float32, float16 or bfloat16."""
        found = {"default": self.dtype, "vae": self._dtype("decoder")}
        return {name: str(dtype).removeprefix("torch.") for name, dtype in found.items()}

    def _dtype(self, role: Role) -> torch.dtype:
        return self.source.placement.dtype(role, overflows=role == "decoder" and self.vae_overflows)

    @property
    def vae_overflows(self) -> bool:
        """Whether the autoencoder needs a wider range than float16 has."""
        return False

    def _json(self, name: str) -> Any:
        return read_json(self.path / name)

    def _network(self) -> Any:
        dtype = self._dtype("policy")
        return self.network_class.from_pretrained(self.path, subfolder=self.network_name, torch_dtype=dtype)

    def _part(self, name: str, kind: Any, role: Role) -> Any:
        """A frozen part of the pipeline. Cast while it loads, so that what T5 needs in float32 stays in it.

        Raises ValueError where weights are missing: transformers 4 fills in random ones for names that 5 gave.
        """
        if name not in self._parts:
            how = {"torch_dtype": self._dtype(role), "output_loading_info": True}
            part, info = kind.from_pretrained(self.path, subfolder=name, **how)
            if missing := sorted(info["missing_keys"]):
                raise ValueError(
                    f"'{self.path / name}' lacks {len(missing)} weights of {kind.__name__} ({missing[0]}, ...); it is "
                    "damaged, or another version of transformers saved it: install that one"
                )
            self._parts[name] = place(part, role, self.source.placement)
        return self._parts[name]

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder, loaded when first used."""
        return self._part("vae", AutoencoderKL, "decoder")

    def text_encoder(self, name: str) -> Any:
        """A text encoder by its name in the pipeline, loaded when first used."""
        return self._part(name, self.text_classes[name][0], "encoder")

    def release(self) -> None:
        """Free the autoencoder and the text encoders; they load again when used."""
        self._parts.clear()
        free_memory(self.device)

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Cond:
        """B prompts -> a Cond with batch axis B, without size. Prompts are cut at the text encoders' length."""

    @torch.no_grad()
    def _read(self, name: str, prompts: Sequence[str], length: int | None = None, **options: Any) -> Any:
        """What a text encoder gives for B prompts of `length` tokens, the tokenizer's own length when left out."""
        tokenizer = self._tokenizers[name]
        ids = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=length or tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(name)(ids.to(self.device), **options)

    def token_counts(self, prompts: Sequence[str]) -> tuple[int, list[int]]:
        """The most tokens of a prompt that a text encoder reads, and how many each prompt has."""
        t5 = {name for name, (kind, _) in self.text_classes.items() if "T5" in kind.__name__}
        limits = {
            name: self.source.max_sequence_length if name in t5 else tokenizer.model_max_length
            for name, tokenizer in self._tokenizers.items()
        }
        name = max(limits, key=lambda x: limits[x])
        ids = self._tokenizers[name](list(prompts), verbose=False).input_ids if prompts else []
        return limits[name], [len(x) for x in ids]

    def _read_clip_pair(self, prompts: Sequence[str]) -> tuple[Tensor, list[Any]]:
        """Two CLIP encoders: their last but one hidden states side by side [B, L, D1 + D2], and both outputs."""
        outputs = [self._read(name, prompts, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
        return torch.cat([out.hidden_states[-2].float() for out in outputs], dim=-1), outputs

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> scaled latents [B, C, h, w], the mean of the posterior."""
        (pixels,) = as_input(self.vae, pixels.to(self.device))
        mean = self.vae.encode(pixels * 2 - 1).latent_dist.mode().float()
        return (mean - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> pixels [B, 3, H, W] in [0, 1], differentiable.

        Without gradients a few are decoded at a time: an image of 1024 pixels takes some 3 GB while it is decoded.
        """
        size = len(latents)
        if not torch.is_grad_enabled():
            size = max(1, DECODED_PIXELS // (self.factor**2 * latents.shape[2] * latents.shape[3]))
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
        parts = [self.vae.decode(some).sample.float() for some in as_input(self.vae, *latents.split(size))]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    @property
    def factor(self) -> int:
        """How many pixels wide a latent is."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def patch(self) -> int:
        """How many latents wide the smallest piece is that the network can take."""
        return 1

    @property
    def smallest(self) -> int:
        """How many pixels wide the smallest piece of an image is that the model draws."""
        return self.factor * self.patch

    @property
    @abstractmethod
    def prompt_widths(self) -> tuple[int, int | None]:
        """Numbers in the embedding of a token that the network reads, and in the pooled one, None without."""

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square image of `resolution` pixels. ValueError where it does not divide."""
        step = max(8, self.smallest)  # the stock pipelines take no other sizes than multiples of 8
        if resolution % step:
            raise ValueError(f"'data.resolution' = {resolution} is not a multiple of {step}, as this model needs it")
        return self.vae_config["latent_channels"], resolution // self.factor, resolution // self.factor

    @abstractmethod
    def grid(self, steps: int, resolution: int) -> Tensor:
        """Descending timesteps [steps] in the schedule's t, for square images of `resolution` pixels.

        Those of DDIM or flow Euler, with the spacing, offset and shift of the pipeline's scheduler.
        """

    @property
    def text_parts(self) -> list[str]:
        """The names in the pipeline of its text encoders and their tokenizers."""
        return [part for name in self.text_classes for part in (name, tokenizer_of(name))]

    def pipeline(self, network: Any, *, text: bool = True) -> Any:
        """The stock diffusers pipeline around `network`, sharing the other parts of this backbone.

        Without `text` no text encoder is loaded, and calls take `prompt_embeds`.
        """
        parts: dict[str, Any] = dict.fromkeys(self.text_parts) | {self.network_name: network, "vae": self.vae}
        for name, tokenizer in self._tokenizers.items() if text else ():
            parts |= {name: self.text_encoder(name), tokenizer_of(name): tokenizer}
        parts |= {"scheduler": self.scheduler(), **self.left_out}
        pipeline = self.pipeline_class.from_pretrained(self.path, **parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def scheduler(self) -> Any:
        """The stock pipeline's, by `scheduler_config`."""
        return getattr(diffusers, self.scheduler_config["_class_name"]).from_config(self.scheduler_config)

    def pipeline_latents(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] as the `latents` argument of the stock pipeline takes them."""
        return latents
