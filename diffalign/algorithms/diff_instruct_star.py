"""Diff-Instruct* (Luo et al., 2024, arXiv 2410.20898): a few-step generator against a reward and a reference's scores.

    generator: -reward_weight r(x0, c) + D(aux, guided reference; x_t),   x0 = generator(z, c),  x_t = a x0 + s eps
    aux:       mean over C, h, w of (aux(a x0 + s eps, t, c) - target)^2 on the generator's samples

D is one of diffalign/objectives/divergence.py. Without rewards and with distance kl it is Diff-Instruct (2305.18455),
with rewards Diff-Instruct++ (2410.18881); with huber SIM, with sid SiD. It needs prompts and no images.

No code of Diff-Instruct* was released; what its text leaves open is chosen so:
- scores are compared as predictions of the noise with equal weight on every level; c is 1e-3 of the root of the size;
- t is uniform over the middle 96 % of levels; the aux network sees the same number of samples a turn;
- a generator of several steps is trained at one of them, drawn for each micro-batch, on its own samples (DMD2's
  backward simulation);
- guidance inner puts the guided reference into D, outer adds guidance beside it, (guidance - 1) times in D's units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffalign.algorithms.base import Algorithm, Turn, check_inner_gradients
from diffalign.diffusion.noising import Noising, errors
from diffalign.diffusion.schedule import per_sample
from diffalign.diffusion.steps import Network
from diffalign.networks.lora import Adapter
from diffalign.networks.sampler import Sampler, Transition
from diffalign.networks.scores import ScoreNetworks
from diffalign.objectives.divergence import Distance, NoisySample, gradient, guidance_scale_of
from diffalign.objectives.rewards import Rewards, norm
from diffalign.types import Cond, Metrics, PromptBatch, Recent

MIDDLE = (0.02, 0.98)
"""Levels between which scores are compared, as fractions of the way to pure noise (DMD2)."""


class DiffInstructStar(Algorithm):
    """Two players: the generator, and the aux network that learns the scores of the generator's samples.

    Positional: generator and aux as prepared by accelerate, the score networks themselves, the generator's sampler, the
    noising of the run, the Cond of the empty prompt, and the rewards (None for none).

    Args:
        reward_weight: of the mean reward against the distance
        distance: huber (Diff-Instruct*, SIM), l2, sid, or kl (Diff-Instruct, Diff-Instruct++)
        huber_c: smoothing of huber as a share of a latent's typical norm
        sid_alpha: 1 is l2, 1.2 what SiD publishes; of distance sid
        guidance: classifier-free guidance of the reference; 1 for none
        guidance_place: inner, the guided reference inside the distance; outer, guidance as a term of its own
        aux_rounds: turns of the aux network before each one of the generator
        graph: vjp holds one network's graph at a time, for two more forwards; plain is one graph through all
    """

    inner_gradients = True
    shown = ("generator/loss", "generator/reward", "generator/score_gap", "aux/loss")

    def __init__(
        self,
        generator: nn.Module,
        aux: nn.Module,
        scores: ScoreNetworks,
        sampler: Sampler,
        noising: Noising,
        empty: Cond,
        rewards: Rewards | None = None,
        *,
        reward_weight: float = 1.0,
        distance: Distance = "huber",
        huber_c: float = 1e-3,
        sid_alpha: float = 1.0,
        guidance: float = 1.0,
        guidance_place: Literal["inner", "outer"] = "inner",
        aux_rounds: int = 5,
        graph: Literal["vjp", "plain"] = "vjp",
    ):
        if rewards is not None:
            rewards.require_gradient(type(self).__name__)
        self.players = {"generator": generator, "aux": aux}
        self.generator, self.aux, self.scores = generator, aux, scores
        self.sampler, self.noising, self.empty, self.rewards = sampler, noising, empty, rewards
        self.reward_weight, self.distance, self.aux_rounds = reward_weight, distance, aux_rounds
        self.settings: dict[str, Any] = {"huber_c": huber_c, "sid_alpha": sid_alpha, "graph": graph}
        self.settings["using"] = (scores.using_aux, scores.using_reference)
        self.guidance, self.inner = guidance, guidance_place == "inner"

    @staticmethod
    def check(cfg: dict[str, Any], backbone: dict[str, Any], teacher: dict[str, Any], run: dict[str, Any]) -> list[str]:
        """What cannot work in an `algorithm` section with these other sections, one line each."""
        problems = [f"'algorithm.{k}' = {cfg[k]} must be positive" for k in ("huber_c", "aux_rounds") if cfg[k] <= 0]
        problems += check_inner_gradients(backbone=backbone, teacher=teacher, run=run)
        names = ("reward_weight", "guidance")
        problems += [f"'algorithm.{k}' = {cfg[k]} must be 0 or more" for k in names if cfg[k] < 0]
        if cfg["sid_alpha"] != 1 and cfg["distance"] != "sid":
            problems.append("'algorithm.sid_alpha' has an effect on 'algorithm.distance' = sid only")
        return problems

    def turns(self, step: int) -> Sequence[Turn]:
        return [*[Turn("aux", self.aux_loss)] * self.aux_rounds, Turn("generator", self.loss)]

    def state(self) -> dict[str, Tensor]:
        return {} if self.rewards is None else self.rewards.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        if self.rewards is not None:
            self.rewards.load(state)

    def transition(self, batch: PromptBatch, *, grad: bool) -> Transition:
        """The generator at one of its steps, whose x0 [B, C, h, w] is what it is trained on."""
        stop = self.sampler.draw_step(batch.keys)
        return self.sampler.walk(self.generator, batch.cond, batch.keys, stop=stop, graded=(stop,) if grad else ())[-1]

    def point(self, x0: Tensor, batch: PromptBatch) -> tuple[NoisySample, Tensor]:
        """Noised samples and their timesteps [B]."""
        schedule = self.noising.schedule
        t = self.noising.sample(batch.keys).clamp(*schedule.at(torch.tensor(MIDDLE))).to(x0.device)
        eps = self.noising.noise(batch.keys, x0)
        return NoisySample(schedule.add_noise(x0, eps, t), eps, *schedule.coefficients(t)), t

    def aux_loss(self, batch: PromptBatch) -> tuple[Tensor, Metrics]:
        """B prompts -> the denoising error of the aux network on the generator's samples."""
        with torch.no_grad():
            x0 = self.transition(batch, grad=False).x0
        _activate(self.scores.aux)
        t, eps = self.noising.sample(batch.keys).to(x0.device), self.noising.noise(batch.keys, x0)
        error = errors(self.aux, self.noising.add(x0, eps, t, batch.cond))
        return error.mean(), {"error": error.detach()}

    def loss(self, batch: PromptBatch) -> tuple[Tensor, Metrics]:
        """B prompts -> a loss whose gradient is the generator's, and per sample [B] reward, score gap and gradients."""
        transition = self.transition(batch, grad=self.settings["graph"] == "plain")
        x0 = transition.x0
        p, t = self.point(x0.detach(), batch)
        follows, leads = self._eps(self.scores.aux, t, batch.cond), self._guided(t, batch.cond)
        descent, aux, ref = gradient(self.distance, follows, leads, p, **self.settings)
        metrics: dict[str, Tensor] = {"score_gap": norm(aux - ref), "distance_gradient": norm(descent)}
        if not self.inner and self.guidance != 1:
            empty = self._eps(self.scores.reference, t, self._without(batch.cond))(p.x_t)
            scale = per_sample(guidance_scale_of(self.distance, ref, p))
            descent = descent + (self.guidance - 1) * scale * (ref - empty)
        total = torch.zeros_like(t, dtype=torch.float32)
        if self.rewards is not None and self.reward_weight:
            found = self.rewards.ascend(x0, batch.prompts)
            descent, total = descent - self.reward_weight * found.direction, found.total
            metrics |= found.metrics
        # Checkpointed activations are recomputed in the backward pass, with the LoRA that is active then.
        _activate(self.generator)
        if not x0.requires_grad:  # only now, so that no other network's graph is in memory with this one
            out = self.sampler.predict(self.generator, transition.x_t, transition.t, batch.cond)
            x0, _ = self.sampler.schedule.split(out, transition.x_t, transition.t)
        along = (descent * x0).flatten(1).sum(1)
        return (along - along.detach() - self.reward_weight * total).mean(), metrics

    def _guided(self, t: Tensor, cond: Cond) -> Callable[[Tensor], Tensor]:
        reference = self.scores.reference.denoiser  # which, unlike the reference, lets gradients through
        plain = self._eps(reference, t, cond)
        if not self.inner or self.guidance == 1:
            return plain
        both = self._eps(reference, t.repeat(2), Cond.cat([cond, self._without(cond)]))

        def guided(x_t: Tensor) -> Tensor:
            given, empty = both(x_t.repeat(2, 1, 1, 1)).chunk(2)
            return empty + self.guidance * (given - empty)

        return guided

    def _eps(self, network: Network, t: Tensor, cond: Cond) -> Callable[[Tensor], Tensor]:
        return lambda x_t: self.noising.schedule.split(network(x_t, t, cond), x_t, t)[1]

    def _without(self, cond: Cond) -> Cond:
        return self.empty.repeat(len(cond.tokens))._replace(size=cond.size)

    def describe(self) -> list[str]:
        return [f"distance {self.distance}, guidance {self.guidance:g}, {self.aux_rounds} aux turns a step"]

    def verdict(self, recent: Recent) -> str:
        reward = f"reward {recent.about('generator/reward')}, " if "generator/reward" in recent.means else ""
        gap = recent.about("generator/score_gap")
        return f"verdict: {reward}score gap {gap}; judge its images with eval/win_rate.py"


def _activate(network: nn.Module) -> None:
    inner = network.module if isinstance(network, DistributedDataParallel) else network
    if isinstance(inner, Adapter):
        inner.activate()
