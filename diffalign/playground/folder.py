"""Saving of playground pipelines in a format that transformers 4 and 5 both read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in half precision.

    Where transformers 4 does not read the format of 5, the format of 4 is written, which 5 reads: the weight names of
    CLIPTextModel (4 would keep random weights), files of slow tokenizers, and the class name of T5's fast tokenizer.
    """
    pipeline.to(torch.float16).save_pretrained(folder)
    for file in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # where it lay on the machine that made it
        file.write_text(json.dumps(config, indent=2) + "\n")
    index = json.loads((folder / "model_index.json").read_text())
    for part, (_, kind) in ((k, v) for k, v in index.items() if isinstance(v, list)):
        if kind == "CLIPTextModel":
            _prefix(folder / part / "model.safetensors")
        elif kind == "CLIPTokenizer":
            _split(folder / part)
        elif kind == "T5Tokenizer":
            index[part][1] = "T5TokenizerFast"
            settings = json.loads((folder / part / "tokenizer_config.json").read_text())
            settings.pop("extra_special_tokens", None)  # an empty list, but 4 expects a dictionary
            (folder / part / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _prefix(file: Path) -> None:
    """Name the weights `text_model.*`."""
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def _split(folder: Path) -> None:
    """Write vocab.json and merges.txt from tokenizer.json."""
    if (folder / "tokenizer.json").exists():
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
