"""AdamW optimizers with learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffalign.config import too_small
from diffalign.networks.placement import trained_parameters


@dataclass
class Player:
    """Trainable network, optimizer and lr schedule. The schedule is a function of the step and has no state."""

    module: nn.Module
    optimizer: Any
    lr: float
    lr_warmup_steps: int
    lr_cosine_steps: int | None = None

    def lr_at(self, step: int) -> float:
        """Learning rate after `step` completed training steps: linear warm-up, then constant or cosine decay to 0."""
        if step < self.lr_warmup_steps or self.lr_cosine_steps is None:
            return self.lr * min(1.0, (step + 1) / max(1, self.lr_warmup_steps))
        done = (step - self.lr_warmup_steps) / max(1, self.lr_cosine_steps - self.lr_warmup_steps)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def check_adamw(cfg: dict[str, Any], section: str = "optimizer") -> list[str]:
    """Problems of an optimizer section of the config, one line each."""
    problems = too_small(section, cfg, lr=0, weight_decay=0, lr_warmup_steps=0)  # lr 0 is allowed: a control run
    if not cfg["eps"] > 0:
        problems.append(f"'{section}.eps' = {cfg['eps']} must be positive")
    if len(cfg["betas"]) != 2 or not all(0 <= beta < 1 for beta in cfg["betas"]):
        problems.append(f"'{section}.betas' = {list(cfg['betas'])} must be two numbers in [0, 1)")
    if cfg["lr_cosine_steps"] is not None and cfg["lr_cosine_steps"] <= cfg["lr_warmup_steps"]:
        problems.append(f"'{section}.lr_cosine_steps' = {cfg['lr_cosine_steps']} must be above 'lr_warmup_steps'")
    return problems


def adamw(
    module: nn.Module,
    *,
    lr: float,
    betas: tuple[float, ...] = (0.9, 0.999),
    weight_decay: float = 1e-2,
    eps: float = 1e-8,
    decay_vectors: bool = True,
    lr_warmup_steps: int = 0,
    lr_cosine_steps: int | None = None,
) -> Player:
    """Network with AdamW (Loshchilov & Hutter, 2019): linear warm-up, then constant lr or cosine decay to 0.

    Args:
        lr: learning rate after warm-up, not scaled by batch or world size
        betas: decay rates of the first and second moment
        weight_decay: decoupled weight decay
        eps: added to the denominator
        decay_vectors: false: no weight decay on parameters with fewer than two dimensions (norms, biases, scales)
        lr_warmup_steps: optimizer steps of the linear warm-up from 0 to lr
        lr_cosine_steps: step at which the cosine decay reaches 0; the lr is constant when left out
    """
    parameters = trained_parameters(module)
    decayed = [p for p in parameters if decay_vectors or p.ndim >= 2]
    undecayed = [p for p in parameters if not (decay_vectors or p.ndim >= 2)]
    groups: list[Any] = [{"params": decayed}]
    if undecayed:
        groups.append({"params": undecayed, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(
        groups, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, eps=eps, fused=True
    )
    return Player(module, optimizer, lr, lr_warmup_steps, lr_cosine_steps)


adamw.check = check_adamw  # type: ignore[attr-defined]
