"""Files of a checkpoint: the trainable weights, and checksums that detect damaged files before they are loaded."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.networks.placement import load_trained_state, trained_state

FILE = "checksums.json"


def save_trained(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
    """Save only the trainable weights; clearing `weights` stops accelerate from writing the full state dicts."""
    if not weights:
        return
    for i, model in enumerate(models):
        save_file(trained_state(model), Path(folder) / f"trained_{i}.safetensors")
    weights.clear()


def load_trained(models: list[nn.Module], folder: str) -> None:
    """Load the trainable weights. Raises ValueError if they belong to other parameters than those that train now."""
    files = sorted(Path(folder).glob("trained_*.safetensors"))
    for model, file in zip(models, files, strict=bool(files)):
        try:
            load_trained_state(model, load_file(file))
        except ValueError as error:
            raise ValueError(f"'{file}' holds {error}") from error
    if files:
        models.clear()


def write_checksums(folder: Path) -> None:
    """Write checksums.json: the BLAKE2b digest of every other file below `folder`."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != FILE)
    (folder / FILE).write_text(json.dumps(dict(zip(names, _digests(folder, names), strict=True)), indent=1) + "\n")


def check_checksums(folder: Path) -> None:
    """Compare all files with checksums.json. Raises ValueError if a file has changed, OSError if one is missing."""
    before = json.loads((folder / FILE).read_text())
    now = dict(zip(before, _digests(folder, list(before)), strict=True))
    if damaged := [name for name in before if before[name] != now[name]]:
        raise ValueError(f"damaged: {', '.join(damaged)}")


def _digests(folder: Path, names: list[str]) -> list[str]:
    with ThreadPoolExecutor() as threads:  # hashlib releases the GIL
        return list(threads.map(lambda name: _digest(folder / name), names))


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
