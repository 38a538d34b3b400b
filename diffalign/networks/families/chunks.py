"""Prompts longer than CLIP reads: chunks of 75 tokens, each with its own begin and end, encoded one by one.

The embeddings of the chunks are concatenated. The pooled embedding is that of the first chunk. kohya's sd-scripts
(`max_token_length`) and the long-prompt pipelines of diffusers' community do the same; sd-scripts drops the inner begin
and end tokens for Stable Diffusion 1 and 2, which here stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def encode_chunks(encoder: Any, tokenizer: Any, prompts: Sequence[str], chunks: int, **options: Any) -> Any:
    """Output of a CLIP text encoder for B prompts of up to `chunks` chunks, as if each were one text."""
    return joined(encoder(chunked(tokenizer, prompts, chunks).to(encoder.device), **options), chunks)


def chunked(tokenizer: Any, prompts: Sequence[str], chunks: int) -> Tensor:
    """Token ids [B * chunks, L] of B prompts, L the tokenizer's length; the chunks of one prompt are adjacent.

    A chunk is a begin token, up to L - 2 tokens, an end token and padding. What is beyond the last chunk is left out.
    """
    size, rows = tokenizer.model_max_length - 2, []
    for ids in tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids:
        for start in range(0, chunks * size, size):
            piece = ids[start : start + size]
            padding = [tokenizer.pad_token_id] * (size - len(piece))
            rows.append([tokenizer.bos_token_id, *piece, tokenizer.eos_token_id, *padding])
    return torch.tensor(rows)


def joined(output: Any, chunks: int) -> Any:
    """Output of a text encoder for `chunked` ids, as if each prompt were one text.

    Hidden states [B * chunks, L, D] -> [B, chunks * L, D], pooled embeddings [B * chunks, D] -> [B, D] of first chunks.
    """

    def join(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(join(one) for one in value)
        return value.unflatten(0, (-1, chunks)).flatten(1, 2) if value.ndim == 3 else value[::chunks]

    return type(output)(**{name: join(value) for name, value in output.items()})
