"""Host time of our own code per LoRA micro-batch of an SDXL-sized network, and in which functions it goes.

    python benchmarks/host_time.py

The network has as many layers as SDXL's, 70 transformer blocks with 560 LoRA layers, but so few channels that kernels
cost next to nothing. Diffusion-DPO runs with a fresh reference, so that LoRAs are switched off and on. Not ours, and
listed beside it: the network's forward and backward pass, clipping and the optimizer's step by torch and accelerate,
once for all micro-batches of a step, reading the batch, which worker processes do in a real run, and freeing, by torch,
of what the backward pass has used. Times are of the processor. `ours_in_python` is what the profiler sees, itself
included. Writes results/host_time.json.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import os
import pstats
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from results_file import RESULTS, commit, cpu, write_rows

torch.set_num_threads(1)
ROWS = RESULTS / "host_time.json"
STEPS = 12
os.environ["ACCELERATE_USE_CPU"] = "true"


class Parts:
    """Seconds of a step in each of the functions that are not ours. Nested ones count once.

    The profiler, once it runs, sees everything but them.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.losses: list[Any] = []  # kept until `free`, with their graphs
        self.profiler = cProfile.Profile(time.process_time)  # of this process, whatever else the machine does
        self.profiling = self._inside = False

    def profile(self, on: bool) -> None:
        self.profiling = on
        (self.profiler.enable if on else self.profiler.disable)()

    def time(self, owner: Any, method: str, name: str) -> None:
        """From now on, time a method of a class."""
        function = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            if self.profiling:
                self.profiler.disable()
            self._inside, started = True, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds[name] += time.process_time() - started
                if self.profiling:
                    self.profiler.enable()

        setattr(owner, method, timed)

    def keep(self, owner: Any, method: str) -> None:
        """Keep the first argument of a method of a class, the loss, until `free`."""
        function = getattr(owner, method)

        def keeping(first: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
            self.losses.append(loss)
            return function(first, loss, *args, **kwargs)

        setattr(owner, method, keeping)

    def free(self) -> None:
        """Free the kept losses."""
        self.losses.clear()


def watch(parts: Parts, found: list[Counter[str]], steps: int) -> Iterator[None]:
    """Measures steps between its turns: some by the clock, then as many under the profiler."""
    yield from itertools.repeat(None, 3)
    for _ in range(steps):
        parts.free()
        parts.seconds.clear()
        started = time.process_time()
        yield
        parts.free()
        total = time.process_time() - started
        found.append(Counter({**parts.seconds, "ours": total - parts.seconds.total()}))
    parts.profile(True)
    for _ in range(steps):
        yield
        parts.free()
    parts.profile(False)


def by_function(profiler: cProfile.Profile, steps: int) -> list[tuple[str, float]]:
    """Functions with the ms a step that passed in them and in what they called, the slowest first."""
    found = []
    for (file, _, name), (_, _, _, cumulative, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        if not file.startswith("<") and "tqdm" not in file:
            found.append((f"{Path(file).name}:{name}", 1e3 * cumulative / steps))
    return sorted(found, key=lambda x: -x[1])


def measure(scratch: Path, steps: int, more: Sequence[str]) -> tuple[list[Counter[str]], cProfile.Profile]:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from diffusers import UNet2DConditionModel
    from gpu_cases import Place, recipe
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    parts, found = Parts(), list[Counter[str]]()
    parts.time(UNet2DConditionModel, "forward", "forward")
    parts.keep(Accelerator, "backward")
    parts.time(Accelerator, "backward", "backward")
    parts.time(Parts, "free", "freeing")
    parts.time(Accelerator, "clip_grad_norm_", "clipping")
    parts.time(AcceleratedOptimizer, "step", "optimizer")
    parts.time(AcceleratedOptimizer, "zero_grad", "optimizer")
    parts.time(_BaseDataLoaderIter, "__next__", "reading")
    place = Place(scratch, tiny=True, until=time.monotonic() + 600, matmul=None)
    settings = [*more, "data.draws_per_sample=null", "backbone.lora_rank=8", "backbone.gradient_checkpointing=false"]
    recipe(place, watch(parts, found, steps), "diffusion_dpo", "sdxl", "deep", 2, settings)
    return found, parts.profiler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="micro-batches measured")
    parser.add_argument("settings", nargs="*", help="of train/diffusion_dpo.py, such as backbone.compile=blocks")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found, profiler = measure(Path(scratch), args.steps, args.settings)
    median: Callable[[str], float] = lambda name: round(1e3 * statistics.median(x[name] for x in found), 2)  # noqa: E731
    names = sorted({name for x in found for name in x})
    row = {"case": "SDXL's layers, LoRA, one micro-batch", "device": cpu(), "unit": "ms", "commit": commit()}
    row |= {name: median(name) for name in names}
    row["ours_in_python"] = round(1e3 * pstats.Stats(profiler).total_tt / args.steps, 2)  # type: ignore[attr-defined]
    print(json.dumps(row))
    for name, ms in by_function(profiler, args.steps)[:25]:
        print(f"{ms:8.2f} ms  {name}  (under the profiler, with what it calls)")
    if not args.settings:
        write_rows(ROWS, [row])


if __name__ == "__main__":
    main()
