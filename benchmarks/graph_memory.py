"""Memory saved in a training step for backward: R0 and R0+ over sampler steps, Diff-Instruct* one graph or two.

    python benchmarks/graph_memory.py            # writes benchmarks/results/graph_memory.json

Counts the peak of the bytes that autograd saves in one step of the recipe (in Diff-Instruct* the generator's turn),
without weights. Playground models, CPU, float32.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.commands import launch
from diffalign.training.trainer import Trainer
from reward_models.files import write_whole

RESULTS = Path(__file__).parent / "results" / "graph_memory.json"
BARE = ["hooks.sample_every=0", "hooks.checkpoint_every=0", "hooks.verify_export=false", "trainer.steps=1"]
BARE += ["monitor.prompts=null", "data.batch_size=16", "data.limit=64"]
STEPS = {"1 step": ["backbone.path=playground_one_step", "sampler.steps=1"], "4 steps": []}
CASES = {
    "R0+, 1 step": ("r0", STEPS["1 step"]),
    "R0+, 4 steps": ("r0", STEPS["4 steps"]),
    "R0, 4 steps": ("r0", [*STEPS["4 steps"], "algorithm.rewarded=final"]),
    "R0, 4 steps, checkpointed": (
        "r0",
        [*STEPS["4 steps"], "algorithm.rewarded=final", "backbone.gradient_checkpointing=true"],
    ),
    "DI*, no guidance, vjp": ("diff_instruct_star", ["algorithm.graph=vjp", "algorithm.guidance=1"]),
    "DI*, vjp": ("diff_instruct_star", ["algorithm.graph=vjp"]),
    "DI*, plain": ("diff_instruct_star", ["algorithm.graph=plain"]),
}


class Saved:
    """Counts the bytes saved by autograd; a storage that is saved twice counts once."""

    def __init__(self) -> None:
        self.live: dict[int, tuple[int, int]] = {}  # storage -> bytes, number of references
        self.peak = 0
        self.weights: set[int] = set()

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        key, saved = storage.data_ptr(), self
        if key in self.weights:
            return tensor
        size, holders = self.live.get(key, (storage.nbytes(), 0))
        self.live[key] = (size, holders + 1)
        self.peak = max(self.peak, sum(size for size, _ in self.live.values()))

        class Held:
            def __init__(self) -> None:
                self.tensor = tensor

            def __del__(self) -> None:
                size, holders = saved.live[key]
                if holders == 1:
                    del saved.live[key]
                else:
                    saved.live[key] = (size, holders - 1)

        return Held()

    @staticmethod
    def unpack(held: Any) -> Tensor:
        return held if isinstance(held, Tensor) else held.tensor


def peak(recipe: str, settings: list[str]) -> float:
    """Peak MB saved for backward in one generator (or policy) turn of the recipe."""
    saved, take = Saved(), Trainer.take

    def counted(self: Trainer, turn: Any, batches: Any) -> Any:
        if turn.player == "aux":
            return take(self, turn, batches)
        for module in self.players.values():
            saved.weights |= {p.untyped_storage().data_ptr() for p in module.module.parameters()}
            base = getattr(module.module, "network", None)
            saved.weights |= {p.untyped_storage().data_ptr() for p in base.parameters()} if base is not None else set()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            return take(self, turn, batches)

    Trainer.take = counted  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            main = runpy.run_path(str(launch.find("train", recipe)))["main"]
            main(["--config=playground", f"run.folder={folder}/run", *BARE, *settings])
    finally:
        Trainer.take = take  # type: ignore[method-assign]
    return saved.peak / 1e6


def main() -> None:
    found = {name: round(peak(*case), 2) for name, case in CASES.items()}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    found_ratios = {
        "R0+, 4 steps / 1 step": round(found["R0+, 4 steps"] / found["R0+, 1 step"], 3),
        "R0, 4 steps / R0+, 4 steps": round(found["R0, 4 steps"] / found["R0+, 4 steps"], 3),
        "DI*, vjp / plain": round(found["DI*, vjp"] / found["DI*, plain"], 3),
    }
    rows = {"megabytes": found, "ratios": found_ratios, "batch": 16, "commit": commit.stdout.strip()}
    write_whole(RESULTS, json.dumps(rows, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
