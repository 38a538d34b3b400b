"""Rewards of latents: decoded, scored, and differentiated with no more than one graph in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffalign.diffusion.schedule import per_sample


class Mixture(Protocol):
    """Several scorers as one: reward_models.WeightedSum."""

    differentiable: bool
    normalise: str
    scorers: Mapping[str, Any]
    weights: Mapping[str, float]

    @property
    def learns(self) -> bool: ...
    def present_weights(self) -> Mapping[str, float]: ...
    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]: ...
    def part(self, name: str, images: Tensor, prompts: Sequence[str]) -> Tensor: ...
    def combine(self, parts: Mapping[str, Tensor]) -> Tensor: ...
    def update(self, parts: Mapping[str, Tensor]) -> None: ...


class RewardDirection(NamedTuple):
    """Where rewards rise: total [B], the direction in x0 [B, C, h, w], and what to log."""

    total: Tensor
    direction: Tensor
    metrics: dict[str, Tensor]


class Rewards:
    """The scores of latents, and the direction in which they rise.

    mixture  the scorers; those of `ascend` must be differentiable
    decode   latents [B, C, h, w] -> images [B, 3, H, W] in [0, 1]
    gather   all ranks' lists -> one list; running statistics are of all ranks' scores
    """

    def __init__(self, mixture: Mixture, decode: Callable[[Tensor], Tensor], gather: Callable[[list[Any]], list[Any]]):
        self.mixture, self.decode, self.gather = mixture, decode, gather

    def state(self) -> dict[str, Tensor]:
        """The running statistics, where there are any."""
        names = ("count", "mean", "squares", "gains") if self.mixture.learns else ()
        return {name: getattr(self.mixture, name).clone() for name in names}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state()`."""
        for name, value in state.items():
            getattr(self.mixture, name).copy_(value)

    def require_gradient(self, who: str) -> None:
        """Raises ValueError where the scorers give none."""
        if not self.mixture.differentiable:
            names = ", ".join(f"'{k}'" for k, s in self.mixture.scorers.items() if not s.differentiable)
            raise ValueError(
                f"scorer {names} gives no gradient; {who} needs one that does (hps_v2.1, pickscore, image_reward, clip)"
            )

    @torch.no_grad()
    def raw_scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] and B prompts -> the sum of scores times weights, not normalised, [B]."""
        parts = self.mixture.parts(images, prompts)
        return sum_of(self.mixture.weights[k] * v for k, v in parts.items())

    @torch.no_grad()
    def score(self, x0: Tensor, prompts: Sequence[str]) -> Tensor:
        """x0 [B, C, h, w] and B prompts -> the weighted sum of scores, float32 [B]."""
        parts = self.mixture.parts(self.decode(x0), prompts)
        self._update(parts)
        return self.mixture.combine(parts)

    def ascend(
        self, x0: Tensor, prompts: Sequence[str], *, unit: bool = False, ceiling: float | None = None
    ) -> RewardDirection:
        """Scores and their gradients at x0 [B, C, h, w], which is taken as a constant.

        unit     every scorer's gradient is scaled to norm 1 for each sample before the weights (R0)
        ceiling  samples whose total is above it pull no more (ReFL's margin)
        """
        with torch.enable_grad():
            leaf = x0.detach().requires_grad_()
            images = self.decode(leaf)
            parts: dict[str, Tensor] = {}
            slopes: dict[str, Tensor] = {}  # of each score in the pixels
            for name in self.mixture.scorers:  # no two scorers' graphs at a time
                pixels = images.detach().requires_grad_()
                score = self.mixture.part(name, pixels, prompts)
                (slopes[name],) = torch.autograd.grad(score.sum(), pixels)
                if not torch.isfinite(slopes[name]).all():
                    raise FloatingPointError(f"the gradient of scorer '{name}' is not finite, though its scores are")
                parts[name] = score.detach()
            self._update(parts)
            ends = {name: score.requires_grad_() for name, score in parts.items()}
            total = self.mixture.combine(ends)
            shares = dict(zip(ends, torch.autograd.grad(total.sum(), [*ends.values()]), strict=True))
            gradients: dict[str, Tensor] = {}
            if unit:
                for name, slope in slopes.items():
                    (gradients[name],) = torch.autograd.grad(images, leaf, slope, retain_graph=True)
                weights = self.mixture.present_weights()
                direction = sum_of(weights[k] * unit_length(g) for k, g in gradients.items())
            else:
                of_pixels = sum_of(per_sample(shares[k]) * slope for k, slope in slopes.items())
                (direction,) = torch.autograd.grad(images, leaf, of_pixels)
        if ceiling is not None:
            direction = direction * per_sample((total < ceiling).float())
        clamped = ((images <= 0) | (images >= 1)).flatten(1).float().mean(1)
        metrics = {"reward": total.detach(), "clamped": clamped.detach(), "reward_gradient": norm(direction)}
        if len(parts) > 1:
            metrics |= {f"reward@{k}": v.detach() for k, v in parts.items()}
            metrics |= {f"weight@{k}": torch.full_like(total, w) for k, w in self.mixture.present_weights().items()}
        metrics |= {f"reward_gradient@{k}": norm(g) for k, g in gradients.items()}
        metrics |= {
            f"cosine@{j}, {k}": cosine(gradients[j], gradients[k]) for j, k in itertools.combinations(gradients, 2)
        }
        return RewardDirection(total.detach(), direction, metrics)

    def _update(self, parts: Mapping[str, Tensor]) -> None:
        if self.mixture.learns:
            device = next(iter(parts.values())).device
            self.mixture.update({k: torch.tensor(self.gather(v.tolist()), device=device) for k, v in parts.items()})


def norm(x: Tensor) -> Tensor:
    """Euclidean norm of each sample, [B]."""
    return x.flatten(1).norm(dim=1)


def unit_length(x: Tensor) -> Tensor:
    """Each sample scaled to norm 1; one without direction stays 0."""
    return x / (per_sample(norm(x)) + 1e-8)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Of the angle between each two samples, [B]."""
    return torch.cosine_similarity(x.flatten(1), y.flatten(1))


def sum_of(terms: Any) -> Tensor:
    """The sum of at least one tensor."""
    return torch.stack(list(terms)).sum(0)


def reward_loss(x0: Tensor, found: RewardDirection) -> Tensor:
    """A loss [B] whose gradient in x0 is minus the direction, and whose value is minus the reward."""
    along = (found.direction * x0).flatten(1).sum(1)
    return along.detach() - along - found.total
