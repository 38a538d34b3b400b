"""Score-matching divergences between a generator and a reference model, and their gradients with respect to x0.

R is the reference's noise prediction (with or without guidance). S is the noise prediction of the aux network, which
learns the generator's score ("fake score"). The score function is -eps/s.

    huber  -<S - R, S - eps> / sqrt(|S - R|^2 + c^2)      pseudo-Huber score matching (SIM, Diff-Instruct*)
    l2     -2 <S - R, S - eps>                            squared score matching
    sid    s/a <S - R, (eps - R) - alpha (S - R)> / mean|eps - R|      SiD; alpha 1 is l2 up to a factor
    kl     <sg[(R - S) / mean|eps - R|], x0>              Diff-Instruct, scaled as in DMD2; no gradient in R and S

The first three are differentiated through both networks at x_t = a x0 + s eps; the sampling distribution of x_t counts
as constant. Their expected value is 0 when the aux network is exact. So the value is no measure of progress
(Luo et al., 2024, arXiv 2410.20898).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffalign.diffusion.schedule import per_sample

Distance = Literal["huber", "l2", "sid", "kl"]
ActivateNetwork = Callable[[], AbstractContextManager[Any]]
"""Returns a context manager that activates one network's LoRA on shared weights."""
NoisePrediction = Callable[[Tensor], Tensor]
"""x_t [B, C, h, w] -> a network's noise prediction, float32 [B, C, h, w]."""


class NoisySample(NamedTuple):
    """Noised samples x_t = a x0 + s eps [B, C, h, w], their noise eps, and the coefficients a, s [B]."""

    x_t: Tensor
    eps: Tensor
    a: Tensor
    s: Tensor


def distance(kind: Distance, aux: Tensor, ref: Tensor, p: NoisySample, *, huber_c: float, sid_alpha: float) -> Tensor:
    """The divergence of each sample [B] (huber, l2 or sid) from S = aux and R = ref, both [B, C, h, w].

    huber_c is c divided by the square root of C h w.
    """
    y = aux - ref
    if kind == "huber":
        c = huber_c * y[0].numel() ** 0.5
        return -dot(y, aux - p.eps) / (dot(y, y) + c**2).sqrt()
    if kind == "l2":
        return -2 * dot(y, aux - p.eps)
    return p.s / p.a * dot(y, (p.eps - ref) - sid_alpha * y) / reference_error(ref, p)


def reference_error(ref: Tensor, p: NoisySample) -> Tensor:
    """mean|eps - R| [B], detached: the absolute error of the reference. SiD and DMD2 divide by it."""
    return (p.eps - ref).detach().abs().flatten(1).mean(1).clamp(min=1e-6)


def guidance_factor(kind: Distance, ref: Tensor, p: NoisySample) -> Tensor:
    """Factor [B] of (eps_cond - eps_null) that gives the guidance term the scale of the divergence's gradient."""
    return {"huber": p.a, "l2": p.a * p.s}[kind] if kind in ("huber", "l2") else 1 / reference_error(ref, p)


def divergence_gradient(
    kind: Distance,
    aux: NoisePrediction,
    ref: NoisePrediction,
    p: NoisySample,
    *,
    huber_c: float,
    sid_alpha: float,
    graph: Literal["vjp", "plain"],
    activate: tuple[ActivateNetwork, ActivateNetwork] = (nullcontext, nullcontext),
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the divergence with respect to x0, and the predictions S and R; all [B, C, h, w].

    graph     vjp holds the graph of one network at a time and runs aux once more; plain holds one graph through both
    activate  context managers for aux and ref where both are LoRAs on shared weights. With vjp they also cover the
              recomputation of checkpointed activations; with plain they do not.
    """
    using_aux, using_ref = activate
    x_t = p.x_t.detach()
    if kind == "kl":
        with torch.no_grad():
            with using_aux():
                s = aux(x_t)
            with using_ref():
                r = ref(x_t)
        return (r - s) / per_sample(reference_error(r, p)), s, r
    settings = {"huber_c": huber_c, "sid_alpha": sid_alpha}
    x_t.requires_grad_()
    with torch.enable_grad():
        if graph == "plain":
            with using_aux():
                s = aux(x_t)
            with using_ref():
                r = ref(x_t)
            (grad,) = torch.autograd.grad(distance(kind, s, r, p, **settings).sum(), x_t)
            return per_sample(p.a) * grad, s.detach(), r.detach()
        with using_aux(), torch.no_grad():
            s = aux(x_t)
        with using_ref():
            r = ref(x_t)
            leaves = [s.detach().requires_grad_(), r.detach().requires_grad_()]
            grad_s, grad_r = torch.autograd.grad(distance(kind, leaves[0], leaves[1], p, **settings).sum(), leaves)
            (through_ref,) = torch.autograd.grad(r, x_t, grad_r)
        with using_aux():
            (through_aux,) = torch.autograd.grad(aux(x_t), x_t, grad_s)
    return per_sample(p.a) * (through_ref + through_aux), s, r.detach()


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of each sample, [B]."""
    return (x * y).flatten(1).sum(1)
