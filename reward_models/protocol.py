"""The scorer protocol, and checks of the inputs and outputs of scorers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

TOLERANCE = 1e-3
"""Tolerance for values outside [0, 1]: half precision and resizing overshoot by less."""


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores images. Larger is better.

    differentiable  whether gradients flow from the scores to the pixels
    unit            the scale of the scores; stored with every result

    Optional: the attributes `choice_temperature` (see `choice_temperature_of`) and `remote` (true if it computes on
    another machine: online RL draws the next images meanwhile), and the methods of Matching and Resizing. A scorer
    that is an `nn.Module` is moved to the device it is loaded on, and gets images there. Other scorers get images on
    the device of their attribute `device`, or on the CPU without it.
    """

    differentiable: bool
    unit: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B, 3, H, W] float in [0, 1] and B prompts -> float32 [B]."""


@runtime_checkable
class Matching(Protocol):
    """A scorer that also measures prompt match, separately from preference."""

    def match(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B, 3, H, W] float in [0, 1] and B prompts -> float32 [B] in [0, 1], the share of a prompt shown."""


@runtime_checkable
class Resizing(Protocol):
    """A scorer with a fixed input size. `reward-score` then forms full batches from images of mixed sizes.

    `score(images, prompts)` equals `score_pixels(preprocess(images), prompts)`.
    """

    def preprocess(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] float in [0, 1], any H and W -> [B, 3, h, w] for the network, h and w always the same."""

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Preprocessed images and B prompts -> float32 [B]."""


class Unscored(ValueError):
    """Raised by `score` if some images of a batch have no score, such as those whose reply cannot be read.

    scores   float32 [B], nan without a score
    reasons  position -> reason, of those images. `reward-score` lists them and continues
    """

    def __init__(self, scores: Tensor, reasons: Mapping[int, str]):
        first, why = next(iter(reasons.items()))
        super().__init__(f"{len(reasons)} of {len(scores)} images have no score; image {first}: {why}")
        self.scores, self.reasons = scores, dict(reasons)


def check_images(images: Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError unless images are [B, 3, H, W] float in [0, 1] and there are B prompts.

    Raises FloatingPointError for images that are not finite: the generator has diverged.
    """
    what = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
    expected = "images must be float in [0, 1] with shape [B, 3, H, W]; got"
    if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"{expected} {what}")
    low, high = torch.stack(images.detach().aminmax()).tolist()
    if low != low:
        raise FloatingPointError(
            f"the images to be scored contain nan ({what}): the model that generated them has diverged"
        )
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(f"{expected} {what} with values from {low:.3g} to {high:.3g}")
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise ValueError(
            f"expected one prompt per image; got {prompts if isinstance(prompts, str) else len(prompts)!r} "
            f"for {len(images)} images"
        )


def scores_of(name: str, scorer: Scorer, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Checked scores of any scorer: images as in `check_images` and B prompts -> finite float32 [B], on its device.

    name is the name of the scorer in errors. Raises ValueError as `checked` does, and if a differentiable scorer
    returns scores without a gradient. Raises FloatingPointError for nan and infinity.
    """
    check_images(images, prompts)
    scores = checked(name, scorer.score(images.to(device_of(scorer)), prompts), len(images))
    if not torch.isfinite(scores).all():
        where = int((~torch.isfinite(scores)).nonzero()[0])
        raise FloatingPointError(
            f"scorer '{name}' returned {scores[where].item()} for an image of prompt {prompts[where]!r}; "
            "a score must be a finite number"
        )
    if scorer.differentiable and images.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
        raise ValueError(f"scorer '{name}' has differentiable = True, but its scores have no gradient")
    return scores


def checked(name: str, scores: Any, count: int) -> Tensor:
    """The output of a scorer for `count` images, float32 or float64 [count]. Raises ValueError for anything else."""
    expected = f"scorer '{name}' must return float32 [{count}] for {count} images; got"
    if not isinstance(scores, Tensor):
        shape = getattr(scores, "shape", None)
        raise ValueError(f"{expected} {type(scores).__name__}{'' if shape is None else f' {tuple(shape)}'}")
    if scores.shape != (count,) or not scores.is_floating_point():
        raise ValueError(f"{expected} {str(scores.dtype).removeprefix('torch.')} {tuple(scores.shape)}")
    return scores if scores.dtype == torch.float64 else scores.float()


def choice_temperature_of(scorer: Scorer) -> float | None:
    """The scorer's attribute `choice_temperature` T, or None without it.

    With T, the scores are a calibrated model of people's choices (Bradley & Terry, 1952): people prefer the first of
    two images of a prompt with probability sigmoid((s_1 - s_2) / T). Without T, scores order images but give no
    probability. Raises ValueError unless T is a finite number above 0.
    """
    found = getattr(scorer, "choice_temperature", None)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 < found < math.inf:
        raise ValueError(
            f"choice_temperature of {type(scorer).__name__} must be a finite number above 0, or None; got {found!r}"
        )
    return float(found)


def device_of(scorer: Scorer) -> torch.device:
    """The device of a scorer: that of its weights, else its attribute `device`, else the CPU."""
    weights = next(scorer.parameters(), None) if isinstance(scorer, nn.Module) else None
    return torch.device(getattr(scorer, "device", "cpu")) if weights is None else weights.device
