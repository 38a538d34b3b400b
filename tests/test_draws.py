"""Keyed randomness."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from diffalign.draws import Draws, seeded

ROOT = Path(__file__).parent.parent


def test_a_draw_depends_on_seed_stream_and_key_only() -> None:
    draws, keys = Draws(7), [(0, "a"), (0, "b"), (1, "a")]
    together = draws.normal(keys, (2, 3), stream="noise")
    assert together.shape == (3, 2, 3)
    for key, value in zip(keys, together, strict=True):
        assert torch.equal(Draws(7).normal([key], (2, 3), stream="noise")[0], value)
    assert not torch.equal(together, Draws(8).normal(keys, (2, 3), stream="noise"))
    assert not torch.equal(together, draws.normal(keys, (2, 3), stream="other"))
    assert torch.equal(draws.normal(keys[::-1], (2, 3), stream="noise"), together.flip(0))


def test_draws_have_the_distribution_they_name() -> None:
    draws, keys = Draws(0), list(range(2000))
    assert abs(draws.normal(keys, (4,), stream="n").std().item() - 1) < 0.03
    uniform = draws.uniform(keys, stream="u")
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean().item() - 0.5) < 0.02
    integers = draws.integers(keys, 3, 7, stream="i")
    assert integers.bincount(minlength=7)[3:].float().sub(500).abs().max() < 80
    assert draws.permutation(50, key=3, stream="order").sort().values.equal(torch.arange(50))


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    Draws(1).normal([1, 2], (3,), stream="noise")
    assert torch.equal(torch.rand(1), expected)


def test_golden_value_never_changes() -> None:
    """A published run must be repeatable with later versions, so this value must not change."""
    assert Draws(0).integers([(0, "x")], 0, 10**9, stream="golden").item() == 459049740


def test_seeded_leaves_no_trace_and_touches_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds the generators of the CPU and, if requested, of the current device only."""
    with seeded(3):
        inside = torch.rand(4)
    torch.manual_seed(11)
    before = torch.rand(4)
    torch.manual_seed(11)
    calls: list[str] = []
    for name, answer in (("get_rng_state", "state"), ("set_rng_state", None), ("manual_seed", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *given, n=name, a=answer: (calls.append(f"{n}{given}"), a)[1])
    for name in ("manual_seed_all", "get_rng_state_all", "device_count"):
        monkeypatch.setattr(torch.cuda, name, lambda *given, n=name: pytest.fail(f"{n} asks every device"))
    with pytest.raises(KeyError), seeded(3, torch.device("cuda")):
        assert torch.equal(torch.rand(4), inside)
        raise KeyError
    assert calls == ["get_rng_state()", "manual_seed(3,)", "set_rng_state('state',)"]
    with seeded(3):
        assert torch.equal(torch.rand(4), inside)
    assert torch.equal(torch.rand(4), before)
    assert len(calls) == 3


def test_no_generator_of_a_device_that_is_not_used_is_saved_or_seeded() -> None:
    """`fork_rng()` without devices saves every GPU's state, `torch.manual_seed` changes every GPU's."""
    bad = []
    for package in ("diffalign", "reward_models", "train", "eval", "tools"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call) or "build" in file.name:  # the script that built the shipped models
                    continue
                called = ast.unparse(node.func)
                if called == "torch.manual_seed" or (called.endswith("fork_rng") and not node.keywords):
                    bad.append(f"{file}:{node.lineno} {called}")
    assert bad == []
