"""A CLIP network from the name or the description of its architecture, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import open_clip
from torch import nn

from reward_models.clip.keys import is_transformers, to_open_clip
from reward_models.files import first_line, read_json
from reward_models.settings import nearest
from reward_models.weights import WEIGHTS, find_file, load_strict, read_state

_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
"""Entries of OpenAI's files that are not weights."""


def clip_config(architecture: str | Mapping[str, Any]) -> dict[str, Any]:
    """The architecture description in the format of open_clip's model configs.

    architecture is a description, the path of a .json file with one (at the top level, or under `model_cfg` as in
    open_clip_config.json), or the name of an open_clip model. Raises ValueError or FileNotFoundError.
    """
    config: Any
    if isinstance(architecture, Mapping):
        config = dict(architecture)
    elif architecture.endswith(".json"):
        if not Path(architecture).is_file():
            raise FileNotFoundError(f"architecture '{architecture}' does not exist")
        config = read_json(architecture)
        config = config.get("model_cfg", config) if isinstance(config, dict) else {}
    else:
        check_model_name(architecture)
        config = open_clip.get_model_config(architecture)
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise ValueError(f"architecture '{architecture}' lacks {', '.join(missing)}")
    if config.get("custom_text") or config["text_cfg"].get("hf_model_name") or "multimodal_cfg" in config:
        raise ValueError(f"architecture '{architecture}' is not a plain CLIP; the scorer `clip` supports it as `model`")
    return config


def check_model_name(name: str) -> None:
    """Raise ValueError, with the nearest known name, if open_clip does not have the model."""
    if open_clip.get_model_config(name) is None:
        raise ValueError(f"open_clip has no model '{name}'{nearest(name, open_clip.list_models())}")


def build_clip(config: Mapping[str, Any]) -> Any:
    """The network of a description, with random weights. Raises ValueError for unsupported settings."""
    try:
        return open_clip.CLIP(**{key: value for key, value in config.items() if key != "custom_text"})
    except TypeError as error:
        raise ValueError(f"open_clip cannot build this architecture: {error}") from error


def image_size(network: Any) -> int:
    """The input size of a network, pixels. Raises ValueError if it is not square."""
    size = network.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"the network takes images of {height} x {width}; only square ones are supported")
    return int(height)


def find_weights(architecture: str | Mapping[str, Any], source: str, filename: str | None) -> Path:
    """The weight file of open_clip's tag for the architecture, or of a file, folder or hub id (see `find_file`).

    In a local folder without that file, `model.safetensors` is used, which `reward-score convert` writes.
    """
    if isinstance(architecture, str) and source in open_clip.list_pretrained_tags_by_model(architecture):
        try:
            return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(architecture, source)))
        except OSError as error:
            raise FileNotFoundError(
                f"the weights '{source}' of {architecture} are not in the cache and cannot be downloaded; "
                f"without network, give a file or folder ({first_line(error)})"
            ) from error
    folder = Path(source)
    converted = folder.is_dir() and not (folder / (filename or WEIGHTS)).is_file()
    return find_file(source, WEIGHTS if converted and (folder / WEIGHTS).is_file() else filename)


def load_clip(network: nn.Module, path: str | PathLike[str]) -> None:
    """Read weights in open_clip's, OpenAI's or transformers' layout into a network, strictly."""
    state = read_state(path)
    if is_transformers(state):
        try:
            state = to_open_clip(state)
        except ValueError as error:
            raise ValueError(f"the tensors in '{path}' do not match the model: {error}") from error
    load_strict(network, state, where=path, ignore=_OPENAI_EXTRAS)
