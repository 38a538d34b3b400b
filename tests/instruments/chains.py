"""Reference implementation of a chain of Gaussian steps, for comparison with samplers and inversions."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from diffalign.diffusion.schedule import Schedule
from diffalign.diffusion.steps import Network, gaussian_step
from diffalign.draws import Draws
from diffalign.types import Cond


def chain(
    network: Network,
    schedule: Schedule,
    cond: Cond,
    x: Tensor,
    grid: Tensor,
    eta: float = 0.0,
    draws: Draws | None = None,
) -> Tensor:
    """From x [B, C, h, w] at grid[0] through the descending grid [S] to the clean end; eta > 0 needs draws."""
    for k, (now, then) in enumerate(itertools.pairwise([*grid.tolist(), schedule.t_clean])):
        t, t_next = (torch.full((len(x),), level, dtype=grid.dtype) for level in (now, then))
        x, std = gaussian_step(schedule, network(x, t, cond), x, t, t_next, eta)
        if draws is not None:
            x = x + std * draws.normal([(i, k) for i in range(len(x))], x.shape[1:], stream="chain")
    return x
