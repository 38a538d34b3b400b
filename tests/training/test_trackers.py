"""Images and metrics in TensorBoard and wandb, read back from the files that both write without a network."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from diffalign.report.curves import curves_png, read_metrics
from diffalign.training.metrics import MetricsFile


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), (grey, 0, 255)).save(buffer, "PNG")
    return buffer.getvalue()


def logged(folder: Path, tracker: str) -> None:
    """Twelve steps, written every five, with images at the first, at one within and at the last."""
    accelerator = Accelerator(log_with=tracker, project_dir=folder, cpu=True)
    accelerator.init_trackers("diffalign", init_kwargs={"wandb": {"dir": str(folder), "name": "run"}})
    metrics = MetricsFile(folder / "metrics.jsonl", accelerator, every=5)
    metrics.show(0, "samples", lambda: png(0))
    for step in range(1, 13):
        metrics.log(step, {"policy/loss": 1 / step})
        if step in (4, 12):
            metrics.show(step, "samples", lambda step=step: png(step))
            metrics.log(step, {"monitor/saturation": 0.5 + step})
            metrics.show(step, "monitor", lambda: curves_png(read_metrics(folder / "metrics.jsonl")))
    metrics.flush()
    accelerator.end_training()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, 13)], "one line for each step, with its later metrics"


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_tensorboard_gets_images_at_their_steps(tmp_path: Path) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logged(tmp_path, "tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = loading.EventAccumulator(str(file), size_guidance={"images": 0})
    events.Reload()
    images = {tag: events.Images(tag) for tag in events.Tags()["images"]}
    assert {tag: [one.step for one in found] for tag, found in images.items()} == {
        "samples": [0, 4, 12],
        "monitor": [4, 12],
    }
    for one in images["samples"]:
        assert np.array_equal(decoded(one.encoded_image_string), decoded(png(one.step)))
    assert images["monitor"][0].width > 300
    assert [one.step for one in events.Scalars("policy/loss")] == [*range(1, 13)]


def entries(log: bytes) -> Iterator[bytes]:
    """Entries of a log in LevelDB's format (blocks of 32 KiB) after wandb's header of seven bytes."""
    place, entry = 7, b""
    while place + 7 <= len(log):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, part = int.from_bytes(log[place + 4 : place + 6], "little"), log[place + 6]
        entry += log[place + 7 : place + 7 + size]
        place += 7 + size
        if part in (1, 4):  # whole, or the last part
            yield entry
            entry = b""


def test_wandb_gets_every_step_and_the_images_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb drops what belongs to an earlier step than the last; nothing of these twelve steps may be lost."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged(tmp_path, "wandb")
    (file,) = tmp_path.rglob("run-*.wandb")
    rows: dict[int, dict] = {}
    for data in entries(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows.setdefault(items["_step"], {}).update(items)
    assert [*sorted(rows)] == [*range(13)] and all("policy/loss" in rows[k] for k in range(1, 13))
    assert [k for k in sorted(rows) if any(key.startswith("samples") for key in rows[k])] == [0, 4, 12]
    assert len([*tmp_path.rglob("media/images/samples*.png")]) == 3
    assert len([*tmp_path.rglob("media/images/monitor*.png")]) == 2


def test_without_a_tracker_no_image_is_made(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", Accelerator(cpu=True), every=1)
    image: Callable[[], bytes] = lambda: pytest.fail("made")  # noqa: E731
    metrics.show(1, "samples", image)
    metrics.log(1, {"policy/loss": 1.0})
    metrics.flush()
