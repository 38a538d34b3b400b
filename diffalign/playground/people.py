"""A population of the playground: people with known tastes of their own, as many as there are names.

All want what the prompt says. Beyond that each has an ideal: how vivid the colour and how large the object should be,
a mixture of three prototypes (weights from a Dirichlet(0.3), so most people lie near one of them).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.draws import Draws
from diffalign.playground.judge import Judge

IDEAL = ("vivid", "area")
"""The aspects of the judge that people have ideals of."""
PROTOTYPES = {"bright": (1.0, 0.4), "faded": (0.3, 0.4), "large": (0.65, 1.0)}
"""What each prototype finds ideal."""
MATCH = {"colour": 1.0, "shape": 1.0, "background": 1.0, "size": 1.0}
STRENGTH = 6.0
"""Points that an image loses for each unit of distance from the ideal."""


class Person(Judge):
    """The exact judge of one person: up to 4 points for the prompt, less the distance from their ideal, as points.

    Args:
        name: a prototype, `bright-` and anything for somebody of exactly its taste, or any other name, which decides it
    """

    def __init__(self, *, name: str):
        super().__init__(taste=MATCH)
        self.name = name
        kind = name.partition("-")[0]
        if kind in PROTOTYPES:
            self.weights = torch.tensor([float(kind == x) for x in PROTOTYPES])
        else:  # a Dirichlet(0.3) is three gammas over their sum; torch draws those with its global generator only
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
