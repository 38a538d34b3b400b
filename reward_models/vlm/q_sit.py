"""Q-SiT: image quality by level words, read from a LLaVA-OneVision that was trained to answer with them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution

from reward_models.placement import as_input
from reward_models.preprocess import resize
from reward_models.protocol import check_images
from reward_models.vlm.readouts import Levels, first_tokens
from reward_models.weights import pretrained, pretrained_whole

Q_SIT = "zhangzicheng/q-sit-mini"
LEVELS, WEIGHTS = ("Excellent", "Good", "Fair", "Poor", "Bad"), (1, 0.75, 0.5, 0.25, 0)
QUESTION = (
    "Assume you are an image quality evaluator. \nYour rating should be chosen from the following five categories: "
    "Excellent, Good, Fair, Poor, and Bad (from high to low). \nHow would you rate the quality of this image?"
)
ANSWER = "The quality of this image is "


class QSiT(nn.Module):
    """Q-SiT (Zhang et al., 2025, arXiv 2503.09197): the softmax over the five level words, times 1 to 0. Prompts are
    ignored.

    Args:
        model: hub id or folder; zhangzicheng/q-sit is the large one
    """

    differentiable = True
    unit = "quality 0 to 1"
    half_dtype = "fp16"
    """As the authors' code."""

    def __init__(self, *, model: str = Q_SIT):
        super().__init__()
        self.name = model
        how: dict[str, Any] = {"torch_dtype": "auto", "use_safetensors": True}
        self.network = pretrained_whole(LlavaOnevisionForConditionalGeneration, model, what="LLaVA-OneVision", **how)
        self.processor = pretrained(AutoProcessor, model, what="processor of LLaVA-OneVision")
        self.readout = Levels([first_tokens(self.processor.tokenizer, [word])[0] for word in LEVELS], WEIGHTS)
        self.eval().requires_grad_(False)

    @property
    def record(self) -> dict[str, Any]:
        """What the scores depend on besides image sizing and dtype; stored with results."""
        asked = hashlib.sha256(f"{QUESTION}\0{ANSWER}".encode()).hexdigest()
        return {"model": self.name, "revision": getattr(self.network.config, "_commit_hash", None), "template": asked}

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B, 3, H, W] float in [0, 1] -> float32 [B] in [0, 1]. The prompts are ignored."""
        check_images(images, prompts)
        height, width = images.shape[-2:]
        ids = self.tokens(height, width).to(images.device).expand(len(images), -1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["image_sizes"] = torch.tensor([[height, width]] * len(images), device=images.device)
        return self.readout(self.network, {**inputs, "pixel_values": as_input(self.network, self.crops(images))})

    def crops(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] float in [0, 1] -> normalised [B, N, 3, S, S]: the whole image, and crops of a larger one, which
        is padded with black; as transformers' processor with Pillow."""
        rule = self.processor.image_processor
        side, (height, width) = rule.size["height"], images.shape[-2:]
        to = select_best_resolution((height, width), rule.image_grid_pinpoints)
        across, down = to[1] / width, to[0] / height
        fit = min(across, down)
        inner = min(math.ceil(height * fit), to[0]), min(math.ceil(width * fit), to[1])
        top, left = (to[0] - inner[0]) // 2, (to[1] - inner[1]) // 2
        larger = F.pad(resize(images, inner), (left, to[1] - inner[1] - left, top, to[0] - inner[0] - top))
        tiles = larger.unflatten(-1, (-1, side)).unflatten(-3, (-1, side)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (rule.image_mean, rule.image_std))
        return (torch.cat([resize(images, (side, side))[:, None], tiles], 1) - mean) / std

    def tokens(self, height: int, width: int) -> Tensor:
        """The chat for an image of this size, with the beginning of the answer, int64 [1, L]."""
        turn = [{"role": "user", "content": [{"type": "text", "text": QUESTION}, {"type": "image"}]}]
        chat = self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        blank = torch.zeros(3, height, width, dtype=torch.uint8)  # its pixels are not used, only its size
        ids = self.processor(images=blank, text=chat, return_tensors="pt")["input_ids"]
        return torch.cat([ids, self.processor.tokenizer(ANSWER, return_tensors="pt")["input_ids"]], dim=-1)

    def cast(self, dtype: torch.dtype) -> QSiT:
        """Convert the network to another dtype."""
        self.network.to(dtype)
        return self
