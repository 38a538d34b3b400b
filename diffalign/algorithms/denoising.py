"""What the algorithms on fixed preferences share: one forward for all images, and a reference that is asked once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.algorithms.base import Algorithm
from diffalign.diffusion.noising import Noised, Noising, errors
from diffalign.diffusion.steps import Network
from diffalign.types import Drawn, Key, LatentBatch, Metrics, Recent

MOST_DRIFT = 0.1
"""By how much of the reference's error the winners' own may rise before images fall apart."""
BUCKETS = 4
"""Metrics are logged for each quarter of the noise levels as well."""


class Denoising(Algorithm):
    """An algorithm whose loss is a function of denoising errors.

    Positional: the policy as prepared by accelerate, the frozen reference (None for reference-free methods), the
    noising of the run.
    """

    shares_noise: bool = True
    """Whether all images of a preference get the same eps; their timestep they share always."""
    remembers_latents: ClassVar[bool] = False
    """Whether a noised latent costs network evaluations, and is kept with the reference's error on it."""
    remembers_reference: ClassVar[bool] = True
    """Whether `remember_reference` can replace the reference where the same draws return (`data.draws_per_sample`)."""

    def __init__(self, policy: nn.Module, reference: Network | None, noising: Noising):
        self.players = {"policy": policy}
        self.policy, self.reference, self.noising = policy, reference, noising
        self.remembered: dict[Key, tuple[float, Tensor | None]] = {}

    @abstractmethod
    def loss(self, batch: LatentBatch) -> tuple[Tensor, Metrics]: ...

    def draw(self, batch: LatentBatch) -> LatentBatch:
        """The batch with the timesteps and noise of its keys, and with what is remembered of the reference."""
        t, eps, x_t, reference = self.noising.sample(batch.keys), None, None, None
        if self.remembered:
            remembered = [self.remembered[key] for key in batch.sample_keys]
            reference = torch.tensor([error for error, _ in remembered])
            x_t = torch.stack([x for _, x in remembered if x is not None]) if self.remembers_latents else None
        if x_t is None:
            eps = self.noising.noise(batch.keys if self.shares_noise else batch.sample_keys, batch.x0)
        return batch._replace(drawn=Drawn(t, eps, x_t, reference))

    def _drawn(self, batch: LatentBatch) -> Drawn:
        """What came with the batch, or else is drawn now, on the batch's device."""
        found = batch.drawn or self.draw(batch).drawn
        assert found is not None
        return found.to(batch.x0.device)

    def noised(self, batch: LatentBatch) -> Noised:
        """The batch's N images, noised with the timestep and the noise of their keys."""
        drawn = self._drawn(batch)
        assert drawn.eps is not None
        eps = drawn.eps[batch.group] if self.shares_noise else drawn.eps
        return self.noising.add(batch.x0, eps, drawn.t[batch.group], batch.sample_cond)

    def remember_reference(self, batches: Iterable[LatentBatch], gather: Callable[[list[Any]], list[Any]]) -> None:
        """Run the reference on every draw of every preference, once; afterwards it is not needed and is let go.

        batches  this rank's share of the draws
        gather   all ranks' lists -> one list
        """
        assert self.reference is not None
        found: list[tuple[Key, tuple[float, Tensor | None]]] = []
        for batch in batches:
            noised = self.noised(batch)
            latents = noised.input[0].cpu() if self.remembers_latents else [None] * len(batch.x0)
            values = zip(errors(self.reference, noised).tolist(), latents, strict=True)
            found += zip(batch.sample_keys, values, strict=True)
        self.remembered, self.reference = dict(gather(found)), None

    def reference_errors(self, batch: LatentBatch, noised: Noised) -> Tensor:
        """[N], as remembered or from a forward of the reference."""
        if self.reference is None:
            remembered = self._drawn(batch).reference
            assert remembered is not None
            return remembered
        return errors(self.reference, noised)

    def by_level(self, metrics: Metrics, noised: Noised) -> dict[str, Tensor]:
        """Each metric [n] again for each quarter of the noise levels, NaN elsewhere; n is N, or G for pairs."""
        fraction = self.noising.schedule.fraction(noised.input[1])
        quarter = (fraction * BUCKETS).ceil().long().clamp(1, BUCKETS) - 1
        return {
            f"{name}@t{k * 1000 // BUCKETS:03d}": torch.where(quarter[: len(values)] == k, values, torch.nan)
            for name, values in metrics.items()
            for k in range(BUCKETS)
        }


def check_reference_free(data: Mapping[str, Any]) -> list[str]:
    """What cannot work in the `data` section of a method without a reference, one line each."""
    if data["draws_per_sample"] is None:
        return []
    return ["'data.draws_per_sample' saves forwards of the reference, and this method has none; leave it out"]


def verdict(recent: Recent) -> str:
    """One line from the last metrics: implicit accuracy, and the drift of the preferred images' error. Says no more
    than so many preferences can: nothing within two standard errors."""
    return f"verdict: {ranking_of(recent)}; {_drift(recent)}"


def ranking_of(recent: Recent, judge: str = "people") -> str:
    """Whether the policy ranks images as they did, as far as the pairs can say."""
    found = recent.share("policy/accuracy")
    if found is None:
        return "no preference of the last steps could be told apart, so nothing was learned from them"
    accuracy, error = found
    said = f"implicit accuracy {accuracy:.2f} +- {2 * error:.2f} over the last {recent.samples} preferences"
    if abs(accuracy - 0.5) <= 2 * error:
        return f"{said}, too few to say whether the policy ranks images as {judge} did"
    return f"{said}, the policy {'ranks' if accuracy > 0.5 else 'does not rank'} images as {judge} did"


def _drift(recent: Recent) -> str:
    change, error = "policy/winner_error_change", recent.means.get("policy/reference_error")
    if not error or change not in recent.means:
        return "judge its images with eval/win_rate.py"
    drift = recent.means[change] / error
    said = f"winner error {drift:+.1%} of the reference's"
    if change not in recent.errors:
        return f"{said} in the last step, one step being too few to say that it moved; judge its images"
    if drift - 2 * recent.errors[change] / error > MOST_DRIFT:
        return f"{said}: over {MOST_DRIFT:.0%} more, which destroys images; lower the lr or raise beta"
    return f"{said}; judge its images with eval/win_rate.py, for these numbers also rise on models being destroyed"
