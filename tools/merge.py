"""Merge LoRAs of one model into one LoRA that stock diffusers loads.

    diffalign merge colour/export size/export:0.5 --model MODEL --out merged
    diffalign merge colour/export size/export --model MODEL --out merged --method average --rank 16

`cat` is the exact sum of the weighted changes; ranks add. `average` divides the weights by their sum, as SELMA merges
K experts with weights 1/K. Neither averages A and B apart, which would mix the experts. --rank compresses by SVD.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.commands import program


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="diffalign merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("loras", nargs="+", metavar="LORA[:WEIGHT]", help="file or folder, and its weight (1)")
    parser.add_argument("--model", required=True, help="folder, hub id or shipped name of the model they belong to")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="replaced as a whole")
    parser.add_argument("--method", choices=["cat", "average"], default="cat")
    parser.add_argument("--rank", type=int, help="largest rank of the result")
    args = parser.parse_args(argv)
    try:
        print(merge(args.loras, args.model, args.out, average=args.method == "average", rank=args.rank))
    except (ValueError, OSError) as error:
        print(f"merge: {program.error_text(error)}", file=sys.stderr)
        return 2
    return 0


def merge(texts: Sequence[str], model: str, out: Path, *, average: bool = False, rank: int | None = None) -> str:
    """Write the merged LoRA to `out`; returns what it is. Raises ValueError or OSError, as `load_lora` does."""
    from diffusers import DiffusionPipeline  # lazy, `--help` does not need it

    from diffalign.networks.loading import find_pipeline
    from diffalign.networks.lora_files import load_lora, weighted
    from diffalign.networks.pipeline_files import left_out
    from reward_models.files import replacing_folder

    if rank is not None and rank < 1:
        raise ValueError(f"--rank must be 1 or more, got {rank}")
    loras = [weighted(text) for text in texts]
    total = sum(lora.weight for lora in loras) if average else 1.0
    if total <= 0:
        raise ValueError(f"the weights of --method average add up to {total:g}, which must be positive; give others")
    folder = find_pipeline(model)
    program.quiet()
    pipe: Any = DiffusionPipeline.from_pretrained(folder, **left_out(folder))
    for i, lora in enumerate(loras):
        load_lora(pipe, lora.path, f"lora_{i}")
    weights = {f"lora_{i}": lora.weight / total for i, lora in enumerate(loras)}
    layers: dict[str, Any] = {}
    words: list[str] = []
    for name, part in pipe.components.items():
        if state := _state(part, weights, rank, words):
            settings = {"r": (r := len(next(iter(state.values())))), "lora_alpha": r}
            settings["target_modules"] = sorted({key.rsplit(".lora_", 1)[0] for key in state})
            layers |= {f"{name}_lora_layers": state, f"{name}_lora_adapter_metadata": settings}
            words.append(f"{name}: rank {r}, {len(state) // 2} layers")
    with replacing_folder(out) as new:
        type(pipe).save_lora_weights(new, **layers)
    return "\n".join([*words, f"merged {len(loras)} LoRAs into '{out}'"])


def _state(part: Any, weights: dict[str, float], rank: int | None, words: list[str]) -> dict[str, Any]:
    """A and B of the weighted sum, all layers of one rank: loaders read one alpha for all. Scales are in B."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, tuple[Any, Any]] = {}
    error = size = 0.0
    for name, layer in part.named_modules() if isinstance(part, torch.nn.Module) else ():
        if not isinstance(layer, BaseTunerLayer):
            continue
        own: Any = layer
        if any(getattr(own, "lora_magnitude_vector", ())):
            raise ValueError(f"a DoRA cannot be merged: its change of '{name}' is no sum; give plain LoRAs")
        used = [x for x in weights if x in own.lora_A]
        down = torch.cat([own.lora_A[x].weight.detach().float() for x in used])
        up = torch.cat([own.lora_B[x].weight.detach().float() * own.scaling[x] * weights[x] for x in used], 1)
        if rank is not None and rank < len(down):
            down, up, lost, all_of_it = _compressed(down, up, rank)
            error, size = error + lost, size + all_of_it
        found[name] = down, up
    r = max((len(down) for down, _ in found.values()), default=0)
    if size:
        words.append(f"compressed to rank {rank}: relative error {(error / size) ** 0.5:.2g}")
    state = {}
    for name, (down, up) in found.items():
        more = r - len(down)
        state[f"{name}.lora_A.weight"] = torch.cat([down, down.new_zeros(more, *down.shape[1:])])
        state[f"{name}.lora_B.weight"] = torch.cat([up, up.new_zeros(len(up), more, *up.shape[2:])], 1)
    return state


def _compressed(down: Any, up: Any, rank: int) -> tuple[Any, Any, float, float]:
    """Best A and B of a rank, the squared norm of what is lost, and that of the whole change."""
    import torch

    left, small_left = torch.linalg.qr(up.flatten(1))
    right, small_right = torch.linalg.qr(down.flatten(1).T)
    u, s, v = torch.linalg.svd(small_left @ small_right.T)
    k = min(rank, len(s))
    new_down = (v[:k] @ right.T).reshape(k, *down.shape[1:])
    new_up = (left @ u[:, :k] * s[:k]).reshape(len(up), k, *up.shape[2:])
    return new_down, new_up, float((s[k:] ** 2).sum()), float((s**2).sum())


if __name__ == "__main__":
    program.run(main)
