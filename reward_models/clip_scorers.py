"""Scorers that compare image and text features of a CLIP model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import torch
import torchvision.transforms.v2.functional as tv
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from reward_models.protocol import check_images

TEXT_CHUNK = 8
"""Prompts that go through the text tower at once. Always as many, the last ones padded: the shape of a batch decides
the last bits of its features, and those of a prompt must not depend on which others were cached before it."""
CACHED_PROMPTS = 20_000


class CLIPScore(nn.Module):
    """CLIPScore of any open_clip model: `weight * max(cos(image, prefix + prompt), 0)`.

    Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning" (2021), whose weight and prefix
    are the defaults. Text-to-image papers often print `weight=100, prefix=""` of a larger model.

    Frozen; gradients flow to the pixels of images that score above zero. Images are resized as tensors, antialiased,
    which differs from Pillow's resize of the 8-bit image by up to 2 of 255 grey levels, at hard edges by up to 11.

    Args:
        model: open_clip architecture; or `local-dir:FOLDER`, `hf-hub:OWNER/NAME`, which bring their weights
        pretrained: open_clip's tag of the weights, or a file; ignored for the two that bring theirs
        weight: factor of the cosine
        prefix: put before every prompt
    """

    differentiable = True

    def __init__(
        self,
        *,
        model: str = "ViT-B-32",
        pretrained: str = "laion2b_s34b_b79k",
        weight: float = 2.5,
        prefix: str = "A photo depicts ",
    ):
        super().__init__()
        self.clip, self._tokenize = _load(model, pretrained)
        self.weight, self.prefix, self.unit = weight, prefix, f"{weight:g}*max(cos,0)"
        self._features: dict[str, Tensor] = {}
        self.eval().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CLIPScore:
        self._features.clear()  # they are on the old device, or of the old dtype
        return super()._apply(fn, recurse)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B, 3, H, W] float in [0, 1] and B prompts -> float32 [B]. Raises ValueError for other images."""
        check_images(images, prompts)
        return self.score_pixels(self.preprocess(images), prompts)

    def preprocess(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> float32 [B, 3, h, w], resized, cropped and normalised as the model was trained."""
        return resize_normalised(images.float(), **self.clip.visual.preprocess_cfg)

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """What `preprocess` made and B prompts -> float32 [B]."""
        weights = next(self.clip.parameters())
        image = self.clip.encode_image(pixels.to(weights.device, weights.dtype)).float()
        text = self.encode_text([self.prefix + prompt for prompt in prompts])
        return self.weight * (F.normalize(image, dim=-1) * text).sum(-1).clamp(min=0)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """B texts, cut to the model's context -> unit vectors float32 [B, D], cached."""
        if len(self._features) > CACHED_PROMPTS:
            self._features.clear()
        missing = [text for text in dict.fromkeys(texts) if text not in self._features]
        device = next(self.clip.parameters()).device
        for i in range(0, len(missing), TEXT_CHUNK):
            chunk = missing[i : i + TEXT_CHUNK]
            tokens = self._tokenize(chunk + [""] * (TEXT_CHUNK - len(chunk))).to(device)
            features = F.normalize(self.clip.encode_text(tokens).float(), dim=-1)
            self._features.update(zip(chunk, features, strict=False))
        return torch.stack([self._features[text] for text in texts])


def _load(model: str, pretrained: str) -> tuple[Any, Callable[[list[str]], Tensor]]:
    """The open_clip model with its weights, and its tokenizer."""
    brings_weights = model.startswith(("local-dir:", "hf-hub:"))
    names_file = "/" in pretrained or pretrained.endswith((".safetensors", ".pt", ".bin"))
    if not brings_weights and names_file and not Path(pretrained).is_file():
        raise FileNotFoundError(f"CLIPScore: pretrained '{pretrained}' does not exist; give a file or a tag")
    if not brings_weights and model.replace("/", "-") not in open_clip.list_models():
        near = get_close_matches(model, open_clip.list_models(), n=1)
        raise ValueError(
            f"CLIPScore: open_clip knows no model '{model}'" + "".join(f", did you mean '{x}'?" for x in near)
        )

    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # open_clip logs what it also raises
    try:
        network = open_clip.create_model(
            model, pretrained=None if brings_weights else pretrained, require_pretrained=True
        )
        return network, open_clip.get_tokenizer(model)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        source = f"model '{model}'" if brings_weights else f"model '{model}' with pretrained '{pretrained}'"
        hint = "" if model.startswith("local-dir:") else "; without network, give a file or model=local-dir:FOLDER"
        raise ValueError(f"CLIPScore cannot load {source}: {error}{hint}") from error
    finally:
        logging.disable(before)


def resize_normalised(
    images: Tensor,
    *,
    size: int | Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    resize_mode: str = "shortest",
    fill_color: int = 0,
    mode: str = "RGB",
) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [B, 3, h, w] by the rules of open_clip's preprocess_cfg, differentiably.

    Resizes with antialias, clamps the overshoot to [0, 1], then crops or pads. resize_mode: `shortest` crops the longer
    side, `longest` pads the shorter one with fill_color of 255, `squash` does neither.
    """
    h, w = (size, size) if isinstance(size, int) else size
    height, width = images.shape[-2:]
    if resize_mode == "squash":
        to = [h, w]
    elif resize_mode == "shortest" and h == w:  # torchvision cuts the fraction of the longer side off, and so must we
        to = [int(h * side / min(height, width)) for side in (height, width)]
    else:
        pick = max if resize_mode == "longest" else min
        ratio = pick(height / h, width / w)
        to = [round(height / ratio), round(width / ratio)]
    if to != [height, width]:
        images = tv.resize(images, to, tv.InterpolationMode(interpolation), antialias=True).clamp(0, 1)
    left, top = max(w - to[1], 0) // 2, max(h - to[0], 0) // 2
    right, bottom = max(w - to[1], 0) - left, max(h - to[0], 0) - top
    images = F.pad(images, (left, right, top, bottom), value=fill_color / 255)
    return tv.normalize(tv.center_crop(images, [h, w]), list(mean), list(std))
