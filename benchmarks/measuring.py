"""Measuring tools of the benchmarks: time of a step, peak memory, operations, how busy the GPU is."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

LEAST = 2
"""Minimum number of timed steps, even after the time limit."""


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
    """Iterator that measures a loop with one step per iteration, and reports results at once.

        for _ in watch(report, "baseline", pairs_a_step, device):
            step()

    Steps are timed between device events, which adds no synchronisation; the rate is `amount` over their median. Peak
    memory is the peak since `fresh`, minus the memory allocated at that time.

    report         receives `<side>` (the rate), `peak_gb_<side>`, with `matmul` `matmul_share`, with `inside_until`
                   `gpu_busy`
    warmup         number of steps before the first timed step
    steps          number of timed steps; fewer, but at least LEAST, after `seconds`
    matmul         TFLOP/s of the matrix unit, for the step's share
    inside_until   run one more step if it can end before this time of `time.monotonic`, under the profiler, which
                   slows the host, so that the busy share is a lower bound
    count          whether to count the operations of the first step, including recomputed ones. Compiled code hides
                   them, and CUDA graphs do from the third call on
    """
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Whole()  # type: ignore[assignment]
    for k in range(warmup):
        with counter if matmul and count and k == 0 else nullcontext():
            yield
    marks, end = [_mark(device)], time.monotonic() + seconds
    while len(marks) <= LEAST or (len(marks) <= steps and time.monotonic() < end):
        yield
        marks.append(_mark(device))
    synchronize(device)
    step = statistics.median(_between(*pair) for pair in itertools.pairwise(marks))
    report(**{side: significant(amount / step), f"peak_gb_{side}": peak_gb(device)})
    if matmul and count and warmup:
        report(matmul_share=significant(counter.get_total_flops() / 1e12 / step / matmul))
    slow, gpu = 4 * step, device.type == "cuda"  # time under the profiler, and to read its events
    if inside_until is None or time.monotonic() + slow > inside_until:
        return
    # Device events only: recording host events as well would be several times slower.
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        yield
        synchronize(device)
        wall = time.perf_counter() - started
    if gpu:
        report(gpu_busy=round(busy_seconds(profiler.events()) / wall, 3))


class Whole:
    """Replaces the module tracker of FlopCounterMode, which fails inside `torch.autograd.grad`, by nothing."""

    parents = ("Global",)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def busy_seconds(events: Any) -> float:
    """Total time in which at least one kernel or copy was running, from the events of a profile."""
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
    """Free unused memory, reset the peak memory, and disallow TF32, which a run may have allowed."""
    gc.collect()
    torch.backends.cuda.matmul.allow_tf32 = False
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _there[:] = [torch.cuda.memory_allocated()]


_there = [0]


def peak_gb(device: torch.device) -> float | None:
    """Peak GB (2^30 bytes) allocated since `fresh`, minus the memory at that time; None on a CPU."""
    if device.type != "cuda":
        return None
    return round((torch.cuda.max_memory_allocated() - _there[0]) / 2**30, 2)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _mark(device: torch.device) -> Any:
    """Time mark in the queue of the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(earlier: Any, later: Any) -> float:
    """Seconds between two time marks."""
    return earlier.elapsed_time(later) / 1e3 if isinstance(later, torch.cuda.Event) else later - earlier


def significant(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
