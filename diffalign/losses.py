"""Losses of preference optimization as pure functions of denoising errors.

The implicit reward of an image is beta/2 times its gain (reference error minus policy error); the margin of a pair is
the winner's reward minus the loser's. Errors are means over C, h, w in float32.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def denoising_error(out: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample over C, h, w: [N, C, h, w] twice -> float32 [N]."""
    return F.mse_loss(out.float(), target.float(), reduction="none").flatten(1).mean(1)


class PairTerms(NamedTuple):
    """What a pair loss may look at; every tensor [B].

    err_w, err_l  policy's errors of winner and loser
    ref_w, ref_l  reference's errors on the same inputs
    beta          mean-form error, factor 1/2
    flip          probability that the label is wrong, in [0, 0.5)
    offset        reward difference the margin should exceed, already in units of the margin
    """

    err_w: Tensor
    err_l: Tensor
    ref_w: Tensor
    ref_l: Tensor
    beta: float
    flip: Tensor
    offset: Tensor | float = 0.0

    @property
    def reward_w(self) -> Tensor:
        return self.beta / 2 * (self.ref_w - self.err_w)

    @property
    def reward_l(self) -> Tensor:
        return self.beta / 2 * (self.ref_l - self.err_l)

    @property
    def margin(self) -> Tensor:
        return self.reward_w - self.reward_l


def dpo(p: PairTerms) -> Tensor:
    """-log sigmoid(m) (Rafailov et al., 2023)."""
    return -F.logsigmoid(p.margin)


def conservative(p: PairTerms) -> Tensor:
    """cDPO: -(1 - e) log sigmoid(m) - e log sigmoid(-m) (Mitchell, 2023). Minimum at m = logit(1 - e)."""
    return -F.logsigmoid(p.margin) + p.flip * p.margin


def robust(p: PairTerms) -> Tensor:
    """rDPO: cDPO debiased, -log sigmoid(m) - e m / (1 - 2e) (Chowdhury et al., 2024). Unbounded below."""
    return -F.logsigmoid(p.margin) - p.flip * p.margin / (1 - 2 * p.flip)


def ipo(p: PairTerms) -> Tensor:
    """(m - 1/2)^2, the beta^2-scaled identity loss (Azar et al., 2023)."""
    return (p.margin - 0.5) ** 2


def hinge(p: PairTerms) -> Tensor:
    """max(0, 1 - m) (Zhao et al., 2023)."""
    return (1 - p.margin).clamp(min=0)


def slic(p: PairTerms) -> Tensor:
    """Reference-free max(0, 1 - beta/2 (err_l - err_w)) (SLiC-HF, Zhao et al., 2023)."""
    return (1 - p.beta / 2 * (p.err_l - p.err_w)).clamp(min=0)


def dpo_sft(p: PairTerms) -> Tensor:
    """-log sigmoid(m) + err_w: DPO with the winner's own denoising loss (RPO, Liu et al., 2024)."""
    return dpo(p) + p.err_w


def offset(p: PairTerms) -> Tensor:
    """-log sigmoid(m - offset) (Amini et al., 2024)."""
    return -F.logsigmoid(p.margin - p.offset)


def nca(p: PairTerms) -> Tensor:
    """-log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l) (Chen et al., 2024)."""
    return -F.logsigmoid(p.reward_w) - 0.5 * F.logsigmoid(-p.reward_w) - 0.5 * F.logsigmoid(-p.reward_l)


def bco(p: PairTerms) -> Tensor:
    """-log sigmoid(r_w) - log sigmoid(-r_l), shift 0 (Jung et al., 2024)."""
    return -F.logsigmoid(p.reward_w) - F.logsigmoid(-p.reward_l)


def sppo(p: PairTerms) -> Tensor:
    """(r_w - 1/2)^2 + (r_l + 1/2)^2, the beta^2-scaled hard-label SPPO (Wu et al., 2024)."""
    return (p.reward_w - 0.5) ** 2 + (p.reward_l + 0.5) ** 2


def apo_zero(p: PairTerms) -> Tensor:
    """1 - sigmoid(r_w) + sigmoid(r_l): winners up, losers down (D'Oosterlinck et al., 2024)."""
    return torch.sigmoid(-p.reward_w) + torch.sigmoid(p.reward_l)


def apo_down(p: PairTerms) -> Tensor:
    """sigmoid(r_w) + 1 - sigmoid(m): winners down, losers further down (D'Oosterlinck et al., 2024)."""
    return torch.sigmoid(p.reward_w) + torch.sigmoid(-p.margin)


def exo(p: PairTerms) -> Tensor:
    """KL(q || (1 - e, e)) with q = (sigmoid(m), sigmoid(-m)) (Ji et al., 2024). Needs e > 0."""
    m = p.margin
    for_w = torch.sigmoid(m) * (F.logsigmoid(m) - torch.log1p(-p.flip))
    for_l = torch.sigmoid(-m) * (F.logsigmoid(-m) - p.flip.log())
    return for_w + for_l


def aot(p: PairTerms) -> Tensor:
    """cDPO on sorted winners' against sorted losers' rewards: stochastic dominance (Melnyk et al., 2024). Needs B > 1."""
    m = p.reward_w.sort().values - p.reward_l.sort().values
    return -F.logsigmoid(m) + p.flip * m


def discopop(p: PairTerms) -> Tensor:
    """(1 - g)(-log sigmoid(m)) + g exp(-m) with g = sigmoid(m / 0.05) (Lu et al., 2024)."""
    gate = torch.sigmoid(p.margin / 0.05)
    # exp(-m) overflows where the gate is closed anyway.
    return (1 - gate) * dpo(p) + gate * torch.exp(-p.margin.clamp(min=-20))


def clipped(p: PairTerms) -> Tensor:
    """-log sigmoid of the margin of rewards clipped to log(1 -+ 0.1): PPO's ratio clamp as in PSO (Miao et al., 2025)."""
    low, high = math.log(0.9), math.log(1.1)
    ratio_w = (p.reward_w / p.beta).clamp(low, high)
    ratio_l = (p.reward_l / p.beta).clamp(low, high)
    return -F.logsigmoid(p.beta * (ratio_w - ratio_l))


PAIR_LOSSES: dict[str, Callable[[PairTerms], Tensor]] = {
    "dpo": dpo,
    "conservative": conservative,
    "robust": robust,
    "ipo": ipo,
    "hinge": hinge,
    "slic": slic,
    "dpo_sft": dpo_sft,
    "offset": offset,
    "nca": nca,
    "bco": bco,
    "sppo": sppo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "exo": exo,
    "aot": aot,
    "discopop": discopop,
    "clipped": clipped,
}
"""Per-pair losses [B] by name. ln_dpo is dpo here: the mean-form error is already normalised by length."""


def check_pair_loss(loss: str, label_smoothing: float, batch_size: int = 2) -> list[str]:
    """What cannot work, one line each."""
    if loss not in PAIR_LOSSES:
        near = difflib.get_close_matches(loss, PAIR_LOSSES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(PAIR_LOSSES)}"
        return [f"'algorithm.loss' = {loss} is not a pair loss; {hint}"]
    problems = []
    if not 0 <= label_smoothing < 0.5:
        problems.append(f"'algorithm.label_smoothing' = {label_smoothing} must lie in [0, 0.5)")
    if loss == "exo" and label_smoothing == 0:
        problems.append("'algorithm.loss' = exo needs 'algorithm.label_smoothing' > 0, such as 0.05")
    if loss == "aot" and batch_size < 2:
        problems.append("'algorithm.loss' = aot sorts within a batch; it needs 'data.batch_size' of 2 or more")
    return problems


def beta_in_other_units(beta: float, dims: int) -> dict[str, float]:
    """The same setting as other code writes it; dims = C h w of the latents."""
    return {
        "mean-form error without the factor 1/2 (diffusers SD LoRA example, Diffusion-KTO)": beta / 2,
        "sum-form error, factor 1/2": beta / dims,
        "sum-form error without the factor 1/2 (pseudo-code of the paper's appendix)": beta / (2 * dims),
    }
