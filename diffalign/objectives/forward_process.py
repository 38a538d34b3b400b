"""Objectives of online RL on the forward process: noised samples instead of trajectories, no log densities.

DiffusionNFT (arXiv 2509.16117), DGPO (2510.08425), AWM (2509.25050), CRD (2603.14128). Published for flow models; here
outputs and targets may also be those of noise or v predictions. Errors are means over C, h, w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.diffusion.schedule import upcast
from diffalign.objectives.policy_gradient import group_mean

LEAST_WEIGHT = 1e-5
"""Smallest mean error that divides an error."""


def optimality(advantage: Tensor, scale: float = 10.0, limit: float = 5.0) -> Tensor:
    """NFT's probability that a sample is a good one, clip(A, -limit, limit) / scale + 1/2, clamped to [0, 1]: [B]."""
    return (advantage.clamp(-limit, limit) / scale + 0.5).clamp(0, 1)


def nft_loss(x0_now: Tensor, x0_old: Tensor, x0: Tensor, good: Tensor, beta: float) -> Tensor:
    """DiffusionNFT's loss [B]: the policy learns from good samples directly, and from bad ones through a mirror image.

    x0_now, x0_old  x0 predictions of the policy, and of the policy that drew x0, at one noised sample [B, C, h, w]
    good            probability that a sample is good [B]: `optimality`

    x+ = beta x0_now + (1 - beta) x0_old and x- = (1 + beta) x0_old - beta x0_now. The loss is (r e+ + (1 - r) e-) /
    beta, each squared error divided by its own mean absolute error. Without that division the optimum is
    x0_old + (2 r - 1)(x0 - x0_old) / beta. An x0 prediction is linear in a velocity or noise prediction, so it is the
    same loss for any network.
    """
    positive = beta * x0_now + (1 - beta) * x0_old
    negative = (1 + beta) * x0_old - beta * x0_now
    errors = [_scaled_error(upcast(x), x0) for x in (positive, negative)]
    return (good * errors[0] + (1 - good) * errors[1]) / beta


def _scaled_error(prediction: Tensor, x0: Tensor) -> Tensor:
    """Squared error [B] over the mean absolute error, which has no gradient."""
    difference = prediction - upcast(x0)
    scale = difference.detach().double().abs().flatten(1).mean(1).clamp(min=LEAST_WEIGHT).to(difference.dtype)
    return difference.square().flatten(1).mean(1) / scale


def dgpo_loss(error: Tensor, error_ref: Tensor, advantage: Tensor, group: Tensor, beta: float) -> Tensor:
    """DGPO's loss, a scalar: denoising errors weighted by advantages, with one weight for each group.

    error, error_ref  squared errors of policy and reference at the same noise [N]; noise is shared in a group
    group             integers [N], equal in a group; the advantages of a group sum to 0

    S_g = beta mean_g A (error - error_ref);  loss = mean of sigmoid(S) A error, and sigmoid(S) has no gradient. It is
    -log sigmoid(-S) / beta up to a constant, averaged over groups. A constant added to a group's errors changes no S.
    """
    weight = (beta * group_mean(advantage * (error - error_ref).detach(), group)).sigmoid()
    return (weight * advantage * error).mean()


def clipped_error(error: Tensor, error_old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """DGPO's clipping, [B] and bool [B]: errors without gradient where rho = exp(error_old - error) has left
    [1 - clip, 1 + clip] in the direction that the advantage favours, and where that is."""
    ratio = (error_old - error).exp()
    far = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
    return torch.where(far, error.detach(), error), far


def awm_log_prob(error: Tensor, t: Tensor, power: float = 0.25, tiny: float = 1e-10) -> Tensor:
    """AWM's stand-in for a log density, from the mean squared error of the velocity [B] at level t [B].

    -((error + tiny)^power - tiny^power) t / power: 0 at error 0. The power is of the mean over C, h, w. The loss is
    `policy_gradient.clipped_policy_loss`; on policy its gradient is that of -A log p.
    """
    return -((error + tiny) ** power - tiny**power) * t / power


def crd_loss(gain: Tensor, good: Tensor, group: Tensor, beta: float) -> Tensor:
    """CRD's loss, a scalar: implicit rewards follow given ones, both centred within their group.

    gain   implicit reward [N]: minus (scaled error of the policy - that of the old policy)
    good   given reward in [0, 1] [N]: `optimality`
    group  integers [N], equal in a group

    mean of (beta (gain - mean_g gain) - (good - mean_g good))^2 5 / beta; the mean of gains has no gradient.
    """
    centres = [group_mean(x, group) for x in (gain.detach(), good)]
    return (beta * (gain - centres[0]) - (good - centres[1])).square().mean() * 5 / beta


def crd_gain(out: Tensor, out_old: Tensor, target: Tensor) -> Tensor:
    """CRD's implicit reward [B] of outputs [B, C, h, w]: how much better the policy predicts than the old one."""
    return _scaled_error(upcast(out_old), target) - _scaled_error(upcast(out), target)
