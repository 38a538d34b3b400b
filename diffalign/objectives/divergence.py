"""How far a generator's samples, noised, lie from the reference's, by two score networks: its gradient in the sample.

With R = eps of the reference (guided or not), S = eps of the aux network that follows the generator, and scores -eps/s:

    huber  -<S - R, S - eps> / sqrt(|S - R|^2 + c^2)      pseudo-Huber score matching (SIM, Diff-Instruct*)
    l2     -2 <S - R, S - eps>                            squared score matching
    sid    s/a <S - R, (eps - R) - alpha (S - R)> / mean|eps - R|      SiD; alpha 1 is l2 up to a factor
    kl     <sg[(R - S) / mean|eps - R|], x0>              Diff-Instruct, scaled as in DMD2; no gradient in R and S

The first three are differentiated through both networks in x_t = a x0 + s eps, whose law is held fixed. Their value is
0 in expectation when the aux network is exact, so it shows no progress (Luo et al., 2024, arXiv 2410.20898).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffalign.diffusion.schedule import per_sample

Distance = Literal["huber", "l2", "sid", "kl"]
Using = Callable[[], AbstractContextManager[Any]]
Eps = Callable[[Tensor], Tensor]
"""x_t [B, C, h, w] -> the noise that a network sees in it, float32 [B, C, h, w]."""


class NoisySample(NamedTuple):
    """Where scores are compared: the noise eps in x_t = a x0 + s eps, with a and s [B]."""

    x_t: Tensor
    eps: Tensor
    a: Tensor
    s: Tensor


def distance(kind: Distance, aux: Tensor, ref: Tensor, p: NoisySample, *, huber_c: float, sid_alpha: float) -> Tensor:
    """The table's terms but kl, [B], from S, R [B, C, h, w]. huber_c is c over the root of a latent's size."""
    y = aux - ref
    if kind == "huber":
        c = huber_c * y[0].numel() ** 0.5
        return -dot(y, aux - p.eps) / (dot(y, y) + c**2).sqrt()
    if kind == "l2":
        return -2 * dot(y, aux - p.eps)
    return p.s / p.a * dot(y, (p.eps - ref) - sid_alpha * y) / spread(ref, p)


def spread(ref: Tensor, p: NoisySample) -> Tensor:
    """mean|eps - R| [B], held fixed: how far off the reference is, by which SiD and DMD2 scale."""
    return (p.eps - ref).detach().abs().flatten(1).mean(1).clamp(min=1e-6)


def guidance_scale_of(kind: Distance, ref: Tensor, p: NoisySample) -> Tensor:
    """What (eps_cond - eps_null) weighs [B] so that guidance outside the distance is in the distance's own units."""
    return {"huber": p.a, "l2": p.a * p.s}[kind] if kind in ("huber", "l2") else 1 / spread(ref, p)


def gradient(
    kind: Distance,
    aux: Eps,
    ref: Eps,
    p: NoisySample,
    *,
    huber_c: float,
    sid_alpha: float,
    graph: Literal["vjp", "plain"],
    using: tuple[Using, Using] = (nullcontext, nullcontext),
) -> tuple[Tensor, Tensor, Tensor]:
    """The distance's gradient in x0 [B, C, h, w], and S and R.

    vjp keeps one network's graph at a time, for one more forward of aux; plain differentiates one graph through both.
    Where both are one network with two LoRAs, `using` switches them: with vjp around the recomputation of checkpointed
    activations too, which plain cannot.
    """
    using_aux, using_ref = using
    x_t = p.x_t.detach()
    if kind == "kl":
        with torch.no_grad():
            with using_aux():
                s = aux(x_t)
            with using_ref():
                r = ref(x_t)
        return (r - s) / per_sample(spread(r, p)), s, r
    settings = {"huber_c": huber_c, "sid_alpha": sid_alpha}
    x_t.requires_grad_()
    with torch.enable_grad():
        if graph == "plain":
            with using_aux():
                s = aux(x_t)
            with using_ref():
                r = ref(x_t)
            (through,) = torch.autograd.grad(distance(kind, s, r, p, **settings).sum(), x_t)
            return per_sample(p.a) * through, s.detach(), r.detach()
        with using_aux(), torch.no_grad():
            s = aux(x_t)
        with using_ref():
            r = ref(x_t)
            ends = [s.detach().requires_grad_(), r.detach().requires_grad_()]
            to_aux, to_ref = torch.autograd.grad(distance(kind, ends[0], ends[1], p, **settings).sum(), ends)
            (through,) = torch.autograd.grad(r, x_t, to_ref)
        with using_aux():
            (more,) = torch.autograd.grad(aux(x_t), x_t, to_aux)
    return per_sample(p.a) * (through + more), s, r.detach()


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of each sample, [B]."""
    return (x * y).flatten(1).sum(1)
