"""The few types that travel between modules: text conditions, batches, metrics, encoders."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Key = Hashable
"""What a random draw belongs to: (epoch, sample id) for a data set, (step, prompt id, k) for a rollout.
Made of ints, strings and tuples of them, so that it means the same in every process."""

Metrics = Mapping[str, Tensor]
"""Detached values to log: a scalar, or one value per sample [B] in which NaN means "not in this group"."""


class Recent(NamedTuple):
    """The metrics of a run's last steps, for the line at its end.

    means    name -> mean over the steps; a metric without a value in any of them is not there
    errors   name -> standard error of that mean, by its spread from step to step; needs two steps
    samples  of how many preferences, prompts or images the steps were, in all
    """

    means: Mapping[str, float]
    errors: Mapping[str, float]
    samples: int

    def share(self, name: str) -> tuple[float, float] | None:
        """A share in [0, 1] and its standard error, no less than that of so many coins. None where it is not there."""
        if name not in self.means or not self.samples:
            return None
        return self.means[name], max(self.errors.get(name, 0.0), 0.5 / self.samples**0.5)

    def about(self, name: str, form: str = ".4g") -> str:
        """The mean with twice its standard error, as far as both are known."""
        if name not in self.means:
            return "unknown"
        spread = f" +- {2 * self.errors[name]:.2g}" if name in self.errors else ""
        return f"{self.means[name]:{form}}{spread}"


class Cond(NamedTuple):
    """What a denoiser is conditioned on besides x_t and t. Batch axis first in every field.

    tokens   [B, L, D]  text embedding, one vector a token
    pooled   [B, P]     pooled text embedding (SDXL, SD3, FLUX)
    size     [B, 6]     SDXL's original size, crop and target size in pixels
    guidance [B]        guidance scale of guidance-distilled models
    user     [B, U, D]  user embedding of personalised models
    """

    tokens: Tensor
    pooled: Tensor | None = None
    size: Tensor | None = None
    guidance: Tensor | None = None
    user: Tensor | None = None

    def repeat(self, n: int) -> Cond:
        """The whole batch n times over along the batch axis: [B, ...] -> [n*B, ...]."""
        return Cond._make(None if x is None else x.repeat(n, *[1] * (x.ndim - 1)) for x in self)

    def to(self, *args: object, **kwargs: object) -> Cond:
        """Every field moved with `Tensor.to`."""
        return Cond._make(None if x is None else x.to(*args, **kwargs) for x in self)  # type: ignore[call-overload]

    def at(self, index: Tensor) -> Cond:
        """The batch entries `index` [N], in that order."""
        return Cond._make(None if x is None else x[index] for x in self)

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Concatenate along the batch axis. Every cond must fill the same fields."""
        return Cond._make(None if xs[0] is None else torch.cat(xs) for xs in zip(*conds, strict=True))


Path = Sequence[tuple[Tensor, Tensor, Tensor]]
"""The steps of an inversion: which samples [M] move, from which levels [M] and to which."""


class Drawn(NamedTuple):
    """What is random about G preferences over N images, drawn on the CPU; see Denoising.draw.

    t          [G]               timestep of each preference
    eps        [G or N, C, h, w] noise of each preference, or of each image; None where nothing is noised
    x_t        [N, C, h, w]      latents noised before training (InPO), or None
    reference  [N]               errors of the reference as they were before training, or None
    path                         how each latent is inverted (InPO), or None
    """

    t: Tensor
    eps: Tensor | None = None
    x_t: Tensor | None = None
    reference: Tensor | None = None
    path: Path | None = None

    def to(self, *args: Any, **kwargs: Any) -> Drawn:
        """Every field moved with `Tensor.to`."""
        return tree_map_only(Tensor, lambda x: x.to(*args, **kwargs), self)


class LatentBatch(NamedTuple):
    """G preferences over N images, ready for a denoiser. One per pair, per ranked group, or per single image.

    Images lie first ones first: of pairs all winners, then all losers, so `x0.chunk(2)` parts them.

    x0      [N, C, h, w]  scaled latents
    cond    batch of G    the prompt of each preference (the empty prompt where the caption was dropped)
    group   int64 [N]     which preference an image belongs to, 0 to G-1
    keys    G keys        (epoch, sample id) of each preference: noise and timestep are drawn from them
    flip    [G]           probability in [0, 0.5) that the label is wrong; 0 when unknown
    scores  [N]           how good an image is, larger is better: the data set's own scores (NaN where it has none), a
                          ranked group's win rates in [0, 1], or 1 for liked and 0 for disliked single images
    size    [N, 6]        original height and width, crop top and left, target height and width in pixels, or None
    drawn   timesteps and noise where they came with the batch; else they are drawn from the keys when needed
    """

    x0: Tensor
    cond: Cond
    group: Tensor
    keys: Sequence[Key]
    flip: Tensor
    scores: Tensor
    size: Tensor | None = None
    drawn: Drawn | None = None

    @property
    def sample_cond(self) -> Cond:
        """The condition of each image: a Cond of batch N."""
        return self.cond.at(self.group)._replace(size=self.size)

    @property
    def sample_keys(self) -> list[Key]:
        """A key for each image: (its preference's key, its number within it)."""
        seen = [0] * len(self.keys)
        keys: list[Key] = []
        for g in self.group.tolist():
            keys.append((self.keys[g], seen[g]))
            seen[g] += 1
        return keys


class GroupBatch(NamedTuple):
    """G prompts with two or more images each, for the training of a scorer. The N images of all of them lie in a row.

    pixels  [N, 3, h, w]  what the scorer's network takes
    prompts N prompts     one for each image
    group   int64 [N]     which prompt an image belongs to, 0 to G-1
    ranks   [N, A]        order within the group by each of A aspects, lower is better; NaN where there is none
    keys    G keys        (epoch, sample id)
    flip    [G]           probability in [0, 0.5) that a label is wrong; 0 when unknown
    """

    pixels: Tensor
    prompts: Sequence[str]
    group: Tensor
    ranks: Tensor
    keys: Sequence[Key]
    flip: Tensor


class ChoiceBatch(NamedTuple):
    """B choices of persons as features z (reward_models.personal.tastes), each with other choices of the same person.

    z_w, z_l              [B, Z]      preferred and other image of a prompt
    person                int64 [B]   number of the person among those who are trained on
    support_w, support_l  [B, S, Z]   other choices of the same person
    there                 bool [B, S] which of them count; their number varies
    keys                  B keys: (epoch, sample id)
    """

    z_w: Tensor
    z_l: Tensor
    person: Tensor
    support_w: Tensor
    support_l: Tensor
    mask: Tensor
    keys: Sequence[Key]


class PromptBatch(NamedTuple):
    """B prompts for methods that draw their own samples.

    prompts  B strings
    cond     batch of B
    keys     B keys: (epoch, prompt id)
    """

    prompts: Sequence[str]
    cond: Cond
    keys: Sequence[Key]


Batch = TypeVar("Batch", LatentBatch, GroupBatch, PromptBatch, ChoiceBatch)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, without waiting for the copy."""
    moved: dict[str, Any] = {
        k: v.to(device, non_blocking=True) for k, v in batch._asdict().items() if isinstance(v, (Tensor, Cond, Drawn))
    }
    return batch._replace(**moved)


class Encoder(Protocol):
    """The frozen half of a backbone: pixels to latents and prompts to conditions.

    `fingerprint` changes whenever the weights, settings or dtypes that decide those outputs change. Where prompts are
    cut, it also has `token_counts(prompts) -> (limit, [tokens of each])`, so that it can be said.
    """

    @property
    def fingerprint(self) -> str: ...

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> scaled latents [B, C, h, w]."""

    def encode_text(self, prompts: Sequence[str]) -> Cond:
        """B prompts -> a Cond with batch axis B."""
