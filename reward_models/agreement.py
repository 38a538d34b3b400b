"""What several scorers agree on, whatever their units: win rates instead of averaged scores (Syn-Pic)."""

from __future__ import annotations

import torch
from torch import Tensor


def win_rates(scores: Tensor) -> Tensor:
    """Scores [R, K] of K images of one prompt by R scorers -> phi, float64 [K] in [0, 1], larger is better.

    phi_i = C_i / (R (K - 1)), where C_i counts, over all scorers and all other images, how often image i scores
    strictly higher (Karthik et al., 2024, arXiv 2410.18013, Algorithm 1). A tie is counted for neither image, so the
    sum over the images is K / 2 without ties and smaller with them. Any monotone change of a scorer's scale changes
    nothing. Raises ValueError for other shapes, fewer than two images, and scores that are not finite.
    """
    if scores.ndim != 2 or scores.shape[0] < 1 or scores.shape[1] < 2:
        raise ValueError(f"win rates need scores [R, K] with R of 1 or more and K of 2 or more; got {[*scores.shape]}")
    if not torch.isfinite(scores).all():
        row, column = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise ValueError(f"scores[{row}, {column}] is not finite; score that image again")
    wins = (scores[:, :, None] > scores[:, None, :]).sum((0, 2))
    return wins.double() / (scores.shape[0] * (scores.shape[1] - 1))
