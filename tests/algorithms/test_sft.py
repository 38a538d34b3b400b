"""SFT: the loss is the winners' error and ignores losers."""

from __future__ import annotations

import torch

from diffalign.algorithms.sft import SFT


def test_only_winners_count(constant, noising_of, batch_of) -> None:
    """A network that predicts 0 has error mean eps^2, independent of the losers."""
    batch, algorithm = batch_of([2] * 3), SFT(constant(0.0), noising_of())
    loss, metrics = algorithm.loss(batch)
    expected = algorithm.noising.noise(batch.keys, batch.x0).square().mean((1, 2, 3))
    assert torch.allclose(metrics["winner_error"], expected, atol=1e-6)
    assert torch.allclose(loss, expected.mean())
    losers = torch.cat([batch.x0[:3], torch.full_like(batch.x0[3:], torch.nan)])
    assert torch.equal(algorithm.loss(batch._replace(x0=losers))[0], loss)
