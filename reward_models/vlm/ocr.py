"""Whether an image shows the text that its prompt puts in quotes: recognised by GOT-OCR2, compared by edit distance."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from transformers import AutoProcessor, GotOcr2ForConditionalGeneration

from reward_models.placement import as_input
from reward_models.protocol import Unscored, check_images
from reward_models.weights import pretrained, pretrained_whole

GOT = "stepfun-ai/GOT-OCR-2.0-hf"
END = "<|im_end|>"


class OCR(nn.Module):
    """1 - edit distance / length of the text in the first double quotes of the prompt, in [0, 1]; without case and
    spaces, and 1 if the text is part of what is read. As in online RL (Flow-GRPO), with another recogniser.

    Args:
        model: GOT-OCR2, a hub id or a folder
        max_new_tokens: length after which the recognised text is cut off
    """

    differentiable = False
    unit = "share of the text"
    half_dtype = "bf16"

    def __init__(self, *, model: str = GOT, max_new_tokens: int = 512):
        super().__init__()
        self.name, self.max_new_tokens = model, max_new_tokens
        how: dict[str, Any] = {"torch_dtype": "auto", "use_safetensors": True}
        self.network = pretrained_whole(GotOcr2ForConditionalGeneration, model, what="GOT-OCR2", **how)
        self.processor = pretrained(AutoProcessor, model, what="processor of GOT-OCR2")
        self.eval().requires_grad_(False)

    @property
    def record(self) -> dict[str, Any]:
        """What the scores depend on besides dtype; stored with results."""
        revision = getattr(self.network.config, "_commit_hash", None)
        return {"model": self.name, "revision": revision, "max_new_tokens": self.max_new_tokens}

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B, 3, H, W] float in [0, 1] and B prompts -> float32 [B]. Raises Unscored for prompts without quotes."""
        check_images(images, prompts)
        targets = [quoted(prompt) for prompt in prompts]
        scores = torch.full((len(prompts),), torch.nan)
        if rows := [i for i, target in enumerate(targets) if target]:
            for i, text in zip(rows, self.read(images[rows]), strict=True):
                scores[i] = likeness(targets[i], text)
        if reasons := {
            i: f'the prompt has no text in double quotes: "{prompts[i][:80]}"' for i, x in enumerate(targets) if not x
        }:
            raise Unscored(scores, reasons)
        return scores.to(images.device)

    @torch.no_grad()
    def read(self, images: Tensor) -> list[str]:
        """The text in each image."""
        pictures = [to_pil_image(x) for x in (images * 255).round().clamp(0, 255).to(torch.uint8).cpu()]
        found = self.processor(pictures, return_tensors="pt").to(images.device)
        inputs = {name: found[name] for name in ("input_ids", "attention_mask")}
        inputs["pixel_values"] = as_input(self.network, found["pixel_values"])
        words = self.processor.tokenizer
        stop: dict[str, Any] = {"tokenizer": words, "stop_strings": END, "max_new_tokens": self.max_new_tokens}
        out = self.network.generate(**inputs, do_sample=False, **stop)
        replies = words.batch_decode(out[:, inputs["input_ids"].shape[1] :])
        special = "|".join(map(re.escape, words.all_special_tokens))
        return [re.sub(special, "", reply.split(END)[0]) for reply in replies]

    def cast(self, dtype: torch.dtype) -> OCR:
        """Convert the network to another dtype."""
        self.network.to(dtype)
        return self


def quoted(prompt: str) -> str:
    """The text in the first pair of double quotes, "" without."""
    found = re.search(r'"([^"]*)"', prompt)
    return found[1].strip() if found else ""


def likeness(target: str, text: str) -> float:
    """1 - distance / length: the Levenshtein distance, at most the length of the target; 0 if the text contains it.
    Case and spaces do not count. Raises ValueError for an empty target."""
    target, text = ("".join(x.lower().split()) for x in (target, text))
    if not target:
        raise ValueError("the target must have a letter")
    if target in text:
        return 1.0
    row = [*range(len(text) + 1)]
    for i, letter in enumerate(target, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(text, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (letter != other))
    return 1 - min(row[-1], len(target)) / len(target)
