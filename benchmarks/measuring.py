"""Measuring tools of the benchmarks: time of a step, peak memory, operations, how busy the GPU is."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

LEAST = 2
"""Steps that are timed even where the time for them is over."""


def watch(
    report: Callable[..., None],
    side: str,
    amount: float,
    device: torch.device,
    *,
    warmup: int = 3,
    steps: int = 8,
    seconds: float = 20.0,
    matmul: float | None = None,
    inside_until: float | None = None,
    count: bool = True,
) -> Iterator[None]:
    """Measures a loop over it, every turn of which takes one step; what is found is reported at once.

        for _ in watch(report, "baseline", pairs_a_step, device):
            step()

    The steps are timed between events of the device, so that nothing waits for it that would not by itself; the rate
    is `amount` over their median. Peak memory is what was allocated since `fresh` above what lay there then.

    report         takes `<side>` (the rate), `peak_gb_<side>`, and of what is looked into `gpu_busy` and `matmul_share`
    warmup         steps before the first that counts
    steps          that count; fewer, but LEAST, once `seconds` are over
    matmul         TFLOP/s of the matrix unit, of which the step's share is taken
    inside_until   look into two more steps, where they can be over by this time of `time.monotonic`: one under the
                   profiler, which slows the host, so that the busy share is a lower bound; one that counts operations,
                   recomputed ones among them
    count          whether to count operations; in compiled code they cannot be seen
    """
    for _ in range(warmup):
        yield
    marks, end = [_mark(device)], time.monotonic() + seconds
    while len(marks) <= LEAST or (len(marks) <= steps and time.monotonic() < end):
        yield
        marks.append(_mark(device))
    synchronize(device)
    step = statistics.median(_between(*pair) for pair in itertools.pairwise(marks))
    report(**{side: significant(amount / step), f"peak_gb_{side}": peak_gb(device)})
    slow, gpu = 4 * step, device.type == "cuda"  # under the profiler, and what it takes to read its events
    if inside_until is None or time.monotonic() + slow > inside_until:
        return
    # The device's events alone: to record the host's as well would slow it several times.
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        yield
        synchronize(device)
        wall = time.perf_counter() - started
    if gpu:
        report(gpu_busy=round(busy_seconds(profiler.events()) / wall, 3))
    if not count or time.monotonic() + slow > inside_until:
        return
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Whole()  # type: ignore[assignment]
    with counter:
        yield
    if matmul:
        report(matmul_share=significant(counter.get_total_flops() / 1e12 / step / matmul))


class Whole:
    """In place of the FlopCounterMode's tracker of modules, which fails inside `torch.autograd.grad`: none."""

    parents = ("Global",)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def busy_seconds(events: Any) -> float:
    """How long at least one kernel or copy of a profile's events was running."""
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
    busy, until = 0.0, float("-inf")
    for start, end in sorted((e.time_range.start, e.time_range.end) for e in kernels):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e6


def matmul_rate(device: torch.device, size: int = 8192) -> float:
    """TFLOP/s of a bf16 product of two matrices of this size, random data."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    marks = [_mark(device)]
    for _ in range(20):
        a @ b
        marks.append(_mark(device))
    synchronize(device)
    return 2 * size**3 / 1e12 / statistics.median(_between(*pair) for pair in itertools.pairwise(marks))


def fresh(device: torch.device) -> None:
    """Let go of what is no longer used, count the peak of memory from here on, and forget that TF32 was allowed."""
    gc.collect()
    torch.backends.cuda.matmul.allow_tf32 = False
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _there[:] = [torch.cuda.memory_allocated()]


_there = [0]


def peak_gb(device: torch.device) -> float | None:
    """GB (2^30 bytes) allocated at most since `fresh`, above what lay there then; None on a CPU."""
    if device.type != "cuda":
        return None
    return round((torch.cuda.max_memory_allocated() - _there[0]) / 2**30, 2)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _mark(device: torch.device) -> Any:
    """This moment in the device's queue."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(earlier: Any, later: Any) -> float:
    """Seconds between two marks that the device has reached."""
    return earlier.elapsed_time(later) / 1e3 if isinstance(later, torch.cuda.Event) else later - earlier


def significant(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
