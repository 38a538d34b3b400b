"""Tiny vision-language models of Qwen: the real classes, random weights, a byte-level tokenizer with a few words."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
WORDS = ("Yes", "No", "Ġexcellent", "Ġgood", "Ġfair", "Ġpoor", "Ġbad")
# The system turn and the order of the parts are those of the released templates.
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Any:
    """A byte-level BPE tokenizer; `WORDS` are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        for i in range(1, len(word)):
            if word[: i + 1] not in vocabulary:
                merges.append((word[:i], word[i]))
                vocabulary[word[: i + 1]] = len(vocabulary)
    tokens = Tokenizer(models.BPE(vocabulary, merges))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, additional_special_tokens=SPECIAL, **named)


def build(kind: str, *, extra: int = 0) -> tuple[Any, Any]:
    """A network of the model type with its processor. `extra` rows of the embedding have no token."""
    import torch
    import transformers as tr

    words = tokenizer()
    ids = {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    ids |= {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    text: dict[str, Any] = {"vocab_size": len(words) + extra, "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    text |= {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 1, 1]}}
    text |= {"bos_token_id": 0, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    patch, images = 14, tr.Qwen2VLImageProcessor
    if kind == "qwen2_vl":
        config, model, processor = tr.Qwen2VLConfig, tr.Qwen2VLForConditionalGeneration, tr.Qwen2VLProcessor
        vision: dict[str, Any] = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    elif kind == "qwen2_5_vl":
        config, model = tr.Qwen2_5_VLConfig, tr.Qwen2_5_VLForConditionalGeneration
        processor = tr.Qwen2_5_VLProcessor
        vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 16}
        vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    else:
        config, model, processor = tr.Qwen3VLConfig, tr.Qwen3VLForConditionalGeneration, tr.Qwen3VLProcessor
        vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 16}
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        patch = 16
    vision |= {"patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 2}
    names = {f"{name.split('_')[0]}_token_id": x for name, x in ids.items() if "pad" in name}
    names |= {f"{name}_token_id": x for name, x in ids.items() if "pad" not in name}
    torch.manual_seed(0)
    network = model(config(text_config=text, vision_config=vision, tie_word_embeddings=False, **names))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.15)
    network.generation_config.eos_token_id = words.eos_token_id
    network.generation_config.pad_token_id = words.pad_token_id
    settings: dict[str, Any] = {"patch_size": patch}
    if kind == "qwen3_vl":
        settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    videos = (tr.Qwen3VLVideoProcessor if kind == "qwen3_vl" else tr.Qwen2VLVideoProcessor)()
    return network.eval(), processor(images(**settings), words, videos, chat_template=CHAT)


def save(kind: str, folder: Path, *, extra: int = 0) -> Any:
    """The network, after it and its processor were written to the folder."""
    network, processor = build(kind, extra=extra)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return network


def without_a_tensor(folder: Path, out: Path) -> Path:
    """A copy of a model's folder, at `out`, whose weights lack a matrix of the first layer."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, out)
    state = load_file(folder / "model.safetensors")
    del state[next(name for name in state if name.endswith("layers.0.mlp.up_proj.weight"))]
    save_file(state, out / "model.safetensors", {"format": "pt"})
    return out
