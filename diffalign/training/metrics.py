"""The file metrics.jsonl of a run, and the trackers of accelerate: one line for each training step."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.types import RecentMetrics
from reward_models.files import read_lines, write_lines, writing


class MetricsFile:
    """Collects the metrics of the steps and writes them every `every` steps. Every rank has one; rank 0 writes."""

    def __init__(self, file: Path, accelerator: Any, every: int):
        self.file, self.accelerator, self.every = file, accelerator, every
        self._pending: list[tuple[int, list[str], Tensor | None, dict[str, float]]] = []
        self._images: list[tuple[int, str, Callable[[], bytes]]] = []

    def rewind(self, step: int) -> None:
        """Delete the metrics after `step`: the resumed run writes them again."""
        if self.accelerator.is_main_process and self.file.exists():
            kept = [row for row in read_lines(self.file) if row["step"] <= step]
            write_lines(self.file, kept)

    def log(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Log the scalars of one training step. They are written every `every` steps, to avoid synchronisation.

        A second call with the same step adds to the line of that step; hooks use this.
        """
        if self._pending and self._pending[-1][0] < step and self._pending[-1][0] % self.every == 0:
            self.flush()
        tensors = {n: v.float() for n, v in values.items() if isinstance(v, Tensor)}
        numbers = {n: v for n, v in values.items() if not isinstance(v, Tensor)}
        stacked = torch.stack([*tensors.values()]) if tensors else None
        self._pending.append((step, [*tensors], stacked, numbers))

    def show(self, step: int, name: str, image: Callable[[], bytes]) -> None:
        """Send an image to the trackers. image: makes the PNG or reads it, after the metrics of its step are written.

        It waits for these metrics, because wandb drops what belongs to an earlier step than the last one it got.
        """
        if self.accelerator.is_main_process and self.accelerator.trackers:
            self._images.append((step, name, image))

    def flush(self) -> None:
        """Write the pending metrics: one JSON object per step, without NaN values."""
        if not self.accelerator.is_main_process or not self._pending:
            self._pending.clear()
            return
        rows: dict[int, dict[str, float]] = {}
        for step, names, stacked, numbers in self._pending:
            values = numbers | dict(zip(names, [] if stacked is None else stacked.tolist(), strict=True))
            rows.setdefault(step, {}).update({n: values[n] for n in sorted(values) if values[n] == values[n]})
        lines = [json.dumps({"step": step, **row}) for step, row in rows.items()]
        with writing(self.file), self.file.open("a") as file:
            file.write("\n".join(lines) + "\n")
        self._pending.clear()
        shown, self._images = self._images, []
        for step in sorted({*rows, *(step for step, _, _ in shown)}):
            if step in rows:
                self.accelerator.log(rows[step], step=step)
            for _, name, image in (one for one in shown if one[0] == step):
                self._send(step, name, image())

    def _send(self, step: int, name: str, png: bytes) -> None:
        """Send one PNG to every tracker."""
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            more = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels}, step=step, **more)

    def recent(self, n: int, samples: int) -> RecentMetrics:
        """Mean and standard error of every metric over the last n logged steps; samples: batch size of a step."""
        lines = read_lines(self.file)[-n:]
        values = {k: [line[k] for line in lines if k in line] for k in {k for line in lines for k in line}}
        errors = {k: statistics.stdev(v) / len(v) ** 0.5 for k, v in values.items() if len(v) > 1}
        return RecentMetrics({k: statistics.fmean(v) for k, v in values.items()}, errors, len(lines) * samples)
