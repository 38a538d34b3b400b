"""Load LoRA files of diffusers, kohya or peft into a stock pipeline, with a warning if they have no effect."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from reward_models.files import first_line, read_json

USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Default file names of LoRAs written by diffusers and peft."""
PEFT = "base_model.model."
"""Prefix of the layer names in files of peft's `save_pretrained`."""


def load_lora(pipe: Any, path: Path) -> None:
    """Load the LoRA of a file or folder into the pipeline, and check that it changes the model.

    Raises FileNotFoundError if there are no weights, ValueError if they fit no layer or have other shapes. Warns on
    stderr if the LoRA is 0 in all layers.
    """
    file = lora_file(path)
    try:
        with safe_open(file, "pt") as opened:
            keys = list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"'--lora {path}' is not a readable safetensors file: {error}") from error
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)  # the errors below cover its warnings
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if all(key.startswith(PEFT) for key in keys):
                _load_peft(pipe, file)
            else:
                pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    except (OSError, ValueError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"'--lora {path}' does not fit this model: {first_line(error)}") from error
    finally:
        diffusers.utils.logging.set_verbosity(before)
    _check(pipe, path, keys)


def lora_file(path: Path) -> Path:
    """The weight file at a path. Raises FileNotFoundError if there is none, ValueError if there are several."""
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"'--lora {path}' does not exist")
    found = sorted(path.glob("*.safetensors"))
    found = next(([path / name] for name in USUAL if (path / name).exists()), found)
    if not found:
        raise FileNotFoundError(f"'--lora {path}' contains no LoRA: there is no .safetensors file in it")
    if len(found) > 1:
        raise ValueError(f"'--lora {path}' contains {', '.join(x.name for x in found[:4])}; give the path of one file")
    return found[0]


def _parts(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _load_peft(pipe: Any, file: Path) -> None:
    """Load a LoRA written by peft's `save_pretrained` into the network or text encoder that has its layers."""
    settings = file.with_name("adapter_config.json")
    if not settings.exists():
        raise ValueError(
            f"it has the layout of peft, but '{settings.name}' with its rank and alpha is missing in the same folder"
        )
    state = {key.removeprefix(PEFT): value for key, value in load_file(file).items()}
    layers = {key.split(".lora_")[0] for key in state}
    fit = {name: len(layers & {n for n, _ in part.named_modules()}) for name, part in _parts(pipe).items()}
    name = max(fit, key=lambda part: fit[part])
    if not fit[name]:
        return
    if fit[name] < len(layers):
        raise ValueError(f"{len(layers) - fit[name]} of its {len(layers)} layers are not in the {name}")
    known = LoraConfig.__dataclass_fields__  # newer versions of peft write additional keys
    config = LoraConfig(**{k: v for k, v in read_json(settings).items() if k in known})
    part: Any = _parts(pipe)[name]
    part.add_adapter(config)
    if left := set_peft_model_state_dict(part, state).unexpected_keys:
        raise ValueError(f"the {name} has no parameter for {', '.join(left[:3])}")


def _check(pipe: Any, path: Path, keys: list[str]) -> None:
    """Raise ValueError if no layer got weights. Warn on stderr if some did not, or if all of them are 0.

    A run with learning rate 0 exports a LoRA of zeros.
    """
    layers = [m for part in _parts(pipe).values() for m in part.modules() if isinstance(m, BaseTunerLayer)]
    if not layers:
        raise ValueError(f"'--lora {path}' has no weights for any layer of this model")
    deltas = (layer.get_delta_weight(name) for layer in layers for name in layer.active_adapters)  # type: ignore[operator]
    if not any(bool(delta.any()) for delta in deltas):
        print(
            f"generate: '--lora {path}' has no effect: in all {len(layers)} layers its weight change is 0, so these "
            "are the images of the base model",
            file=sys.stderr,
        )
    given = sum(any(word in key for word in ("lora_A.", "lora_down.", ".down.weight")) for key in keys)
    if len(layers) < given:
        print(
            f"generate: {given - len(layers)} of the {given} layers of '--lora {path}' are not in this model",
            file=sys.stderr,
        )
