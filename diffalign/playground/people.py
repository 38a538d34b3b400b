"""Unlimited population of simulated people with known individual tastes, one per name.

All prefer images that match the prompt. Each person also has an ideal vividness and object size, a mixture of three
prototypes (weights from a Dirichlet(0.3), so most people are close to one prototype).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.draws import Draws
from diffalign.playground.judge import Judge

IDEAL = ("vivid", "area")
"""Aspects of the judge for which people have ideals."""
PROTOTYPES = {"bright": (1.0, 0.4), "faded": (0.3, 0.4), "large": (0.65, 1.0)}
"""Ideal of each prototype."""
MATCH = {"colour": 1.0, "shape": 1.0, "background": 1.0, "size": 1.0}
STRENGTH = 6.0
"""Points subtracted per unit of distance from the ideal."""


class Person(Judge):
    """The exact judge of one person: up to 4 points for the prompt match, minus points for the distance from the ideal.

    Args:
        name: a prototype; a prototype with a suffix, as `bright-1`, for the same taste; or another name, with its own
        taste
    """

    def __init__(self, *, name: str):
        super().__init__(taste=MATCH)
        self.name = name
        kind = name.partition("-")[0]
        if kind in PROTOTYPES:
            self.weights = torch.tensor([float(kind == x) for x in PROTOTYPES])
        else:  # Dirichlet(0.3): three gammas over their sum; torch samples gammas with its global generator only
            with torch.random.fork_rng(devices=[]):
                torch.random.set_rng_state(Draws(0).generator(name, "person").get_state())
                self.weights = torch.distributions.Dirichlet(torch.full((len(PROTOTYPES),), 0.3)).sample()
        self.ideal = self.weights @ torch.tensor(list(PROTOTYPES.values()))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B, 3, 32, 32] float in [0, 1] and B playground captions -> float32 [B], larger is better."""
        measured = self.measure(images, prompts)
        match = torch.stack([weight * measured[aspect] for aspect, weight in self.taste.items()]).sum(0)
        where = torch.stack([measured[aspect] for aspect in IDEAL], dim=1)
        return match - STRENGTH * (where - self.ideal.to(where)).norm(dim=1)
