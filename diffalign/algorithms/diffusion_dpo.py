"""Diffusion-DPO (Wallace et al., 2023, arXiv 2311.12908) and every loss on its implicit-reward margin.

    gain = err(reference) - err(policy);  margin = beta/2 (gain_w - gain_l);  loss = -log sigmoid(margin)

with err = mean over C, h, w of (network(x_t, t, c) - target)^2, winner and loser sharing t and eps.

Differs from the paper: errors are means, not sums, and beta carries the factor 1/2, both as in the released code.
Differs from the released code:
- reference and policy errors are float32 (there the reference's are half precision: 0.3 logits an ulp at beta 5000);
- crop, flip and caption dropout are drawn once a pair (there the flip differs between winner and loser);
- latents are the mean of the VAE's posterior (there a sample of it);
- v-prediction works (there only eps); the weighting of timesteps is that of the network's own target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from diffalign.algorithms.base import Algorithm
from diffalign.draws import Draws
from diffalign.losses import PAIR_LOSSES, PairTerms, beta_in_other_units, check_pair_loss, denoising_error
from diffalign.schedule import VPSchedule
from diffalign.types import Metrics, PairBatch
