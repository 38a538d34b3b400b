"""The exact judge: measures prompt match and further aspects of preference from pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.playground.world import (
    BACKGROUNDS,
    CENTRE,
    COLOURS,
    GREY,
    PLACES,
    RADII,
    SHAPES,
    SIZE,
    Scene,
    masks,
    parse,
)

ASPECTS = ("colour", "shape", "background", "size", "vivid", "place", "clean", "area")
"""Aspects of `Judge.measure`. The first four are 0 or 1 (match of the caption), the others are in [0, 1]."""

MATCH = ASPECTS[:4]

TRUE_TASTE = {"colour": 1.0, "shape": 1.0, "background": 1.0, "size": 1.0, "vivid": 2.0, "place": 2.0, "clean": 1.0}
"""The true preference, in points: prompt match up to 4, vividness 2, placement 2, cleanliness 1."""


class Judge:
    """Exact scorer of playground images; scores are points in [0, 9] for the true taste.

    taste: weight of each aspect in the score (see ASPECTS). Different people have different tastes.
    """

    differentiable = False
    unit = "points"
    choice_temperature = 0.35
    """Temperature of the simulated annotators, with Bradley-Terry choices by these points."""

    def __init__(self, *, taste: dict[str, float] | None = None):
        self.taste = TRUE_TASTE if taste is None else taste
        unknown = set(self.taste) - set(ASPECTS)
        if unknown:
            raise ValueError(f"unknown aspects in taste: {sorted(unknown)}; known aspects: {', '.join(ASPECTS)}")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B, 3, 32, 32] float in [0, 1] and B playground captions -> float32 [B], larger is better."""
        measured = self.measure(images, prompts)
        return torch.stack([weight * measured[aspect] for aspect, weight in self.taste.items()]).sum(0)

    def match(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Prompt match, float32 [B] in [0, 1]: share of colour, shape, background and size that match."""
        measured = self.measure(images, prompts)
        return torch.stack([measured[aspect] for aspect in MATCH]).mean(0)

    @torch.no_grad()
    def measure(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Every aspect of ASPECTS as float32 [B]. Raises ValueError for other shapes and captions."""
        if images.shape[1:] != (3, SIZE, SIZE) or len(images) != len(prompts) or not images.is_floating_point():
            raise ValueError(
                f"the playground judge needs float images [B, 3, {SIZE}, {SIZE}] in [0, 1] and B prompts; "
                f"got {images.dtype} {tuple(images.shape)} and {len(prompts)} prompts"
            )
        images, device = images.float(), images.device
        wishes = [parse(p) for p in prompts]
        scene, there = look(images)
        hues = torch.tensor(list(COLOURS.values()), device=device) - GREY
        chroma = scene.colour - GREY
        colour = torch.cosine_similarity(chroma[:, None], hues[None], dim=-1).argmax(1)
        grounds = torch.tensor(list(BACKGROUNDS.values()), device=device)
        ground_distance = torch.cdist(scene.background, grounds)

        def wanted(values: list[int]) -> Tensor:
            return torch.tensor(values, device=device)

        want_colour = wanted([list(COLOURS).index(w.colour) for w in wishes])
        want_ground = wanted([list(BACKGROUNDS).index(w.background) for w in wishes])
        radius = torch.tensor([RADII[w.size] if w.size else 0.0 for w in wishes], device=device)
        middle = sum(RADII.values()) / 2
        size = (radius == 0) | ((radius < middle) == (scene.radius < middle))
        spot = torch.tensor([PLACES[w.place] if w.place else CENTRE for w in wishes], device=device)
        away = (torch.stack([scene.x, scene.y], dim=1) - spot).square().sum(1)
        hue = hues[want_colour]
        vivid = ((chroma * hue).sum(1) / hue.square().sum(1)).clamp(0, 1)
        error = (images - scene.render()).square().mean((1, 2, 3)).sqrt()
        right_colour = (colour == want_colour) & (chroma.norm(dim=1) > 0.08) & there
        ground = (ground_distance.argmin(1) == want_ground) & (ground_distance.amin(1) < 0.25)
        return {
            "colour": right_colour.float(),
            "shape": ((scene.shape == wanted([SHAPES.index(w.shape) for w in wishes])) & there).float(),
            "background": ground.float(),
            "size": (size & there).float(),
            # Vividness and placement count only for an object that matches the caption.
            "vivid": vivid * right_colour,
            "place": torch.exp(-away / 8.0) * there,
            "clean": torch.exp(-error / 0.05),
            "area": (torch.pi * scene.radius.square() / SIZE**2 / 0.2).clamp(0, 1) * there,
        }


def look(images: Tensor) -> tuple[Scene, Tensor]:
    """Fit a scene to images [B, 3, SIZE, SIZE]: the best scene of each, and whether there is an object [B]."""
    border = torch.ones(SIZE, SIZE, dtype=torch.bool, device=images.device)
    border[2:-2, 2:-2] = False
    background = images[:, :, border].median(dim=2).values
    offset = images - background[..., None, None]
    distance = offset.norm(dim=1)
    strong = distance > 0.85 * distance.flatten(1).quantile(0.98, dim=1)[:, None, None]
    colour = (images * strong[:, None]).sum((2, 3)) / strong.sum((1, 2)).clamp(min=1)[:, None]
    contrast = colour - background
    mask = (offset * contrast[..., None, None]).sum(1) / contrast.square().sum(1).clamp(min=1e-4)[:, None, None]
    mask = mask.clamp(0, 1) * (mask > 0.2)
    area = mask.sum((1, 2)).clamp(min=1e-6)
    grid = torch.arange(SIZE, device=images.device) + 0.5
    x, y = (mask.sum(1) * grid).sum(1) / area, (mask.sum(2) * grid).sum(1) / area
    radius = (area / torch.pi).sqrt()
    mismatch = (mask[:, None] - masks(x, y, radius)).abs().sum((2, 3)) / area[:, None]
    there = (contrast.norm(dim=1) > 0.1) & (radius > 2.5) & (radius < 12) & (mismatch.amin(1) < 0.5)
    return Scene(mismatch.argmin(1), colour, background, x, y, radius), there
