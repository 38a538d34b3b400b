"""Device of the tests in this folder: DIFFALIGN_TEST_DEVICE, `cuda` on a machine with a GPU; by default `pretend`."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator

import pretend
import pytest
import torch
from accelerate.state import AcceleratorState

from diffalign.training.run import Run

NAME = os.environ.get("DIFFALIGN_TEST_DEVICE") or pretend.NAME


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device that accelerate uses during the test."""
    if NAME == pretend.NAME and not pretend.AVAILABLE:
        pytest.skip("this torch cannot register a device whose kernels are Python")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", NAME)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield torch.device(NAME, 0)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def steps_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[pretend.Seen]]]:
    """steps_seen() -> synchronisations and copies of the host between the metrics of steps k and k + 1, k = 1, 2, ...

    Only the pretend device records them; on others the list is empty.
    """
    log, moments = Run.log, list[tuple[int, Counter[str], Counter[str]]]()
    with pretend.watched() as seen:

        def logged(run: Run, step: int, values: object) -> None:
            log(run, step, values)  # type: ignore[arg-type]
            moments.append((step, seen.waits.copy(), seen.uploads.copy()))

        monkeypatch.setattr(Run, "log", logged)

        def between() -> list[pretend.Seen]:
            pairs = itertools.pairwise(moments if NAME == pretend.NAME else [])
            return [pretend.Seen(w2 - w, u2 - u) for (s, w, u), (s2, w2, u2) in pairs if s2 > s]

        yield between
