"""Base class of the rectified-flow families whose text encoder is a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen3Model

from diffalign.networks.families.flow import FlowBackbone


class LanguageBackbone(FlowBackbone):
    """A backbone with one text encoder, a language model, by default Qwen3 with its chat template.

    thinking  whether the chat template lets the model think
    dropped   number of tokens of the template that are read in addition to `max_sequence_length`
    padding   side of the padding; None for the tokenizer's own
    """

    text_classes: ClassVar = {"text_encoder": (Qwen3Model, AutoTokenizer)}
    thinking: ClassVar[bool] = False
    dropped: int = 0
    padding: ClassVar[str | None] = "right"

    def template(self, prompt: str) -> str:
        """The text that the tokenizer gets for a prompt."""
        message = [{"role": "user", "content": prompt}]
        settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": self.thinking}
        return self._tokenizers["text_encoder"].apply_chat_template(message, **settings)

    @torch.no_grad()
    def _read(self, prompts: Sequence[str]) -> tuple[Any, Tensor]:
        """The text encoder's output for B prompts, L = max_sequence_length + dropped tokens each, and the mask [B, L].

        The mask is float32: 1 for tokens of a prompt, 0 for padding.
        """
        found = self._tokenizers["text_encoder"](
            [self.template(prompt) for prompt in prompts],
            padding="max_length",
            padding_side=self.padding,
            max_length=self.source.max_sequence_length + self.dropped,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        settings = {"attention_mask": found.attention_mask, "output_hidden_states": True, "use_cache": False}
        return self.text_encoder("text_encoder")(found.input_ids, **settings), found.attention_mask.float()

    def token_counts(self, prompts: Sequence[str]) -> tuple[int, list[int]]:
        texts = [self.template(prompt) for prompt in prompts]
        ids = self._tokenizers["text_encoder"](texts, verbose=False).input_ids if texts else []
        return self.source.max_sequence_length, [len(x) - self.dropped for x in ids]
