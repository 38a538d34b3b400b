"""Base class of policy gradients on sampling trajectories: groups of images per prompt, advantages, several updates.

    rollout    G images per prompt from the current policy, without gradients; each transition's log density is stored
    advantage  reward minus the mean of the prompt's group, divided by a standard deviation
    update     for each trained transition: the log density under the policy now, and a loss of the ratio to the stored

A training step is one rollout and `updates` optimizer steps on it, so a checkpoint never falls between a rollout and
its updates.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from diffalign.algorithms.base import Algorithm, Turn
from diffalign.diffusion.steps import Network, log_prob, squared_log_prob
from diffalign.networks.sampler import Sampler, Transition
from diffalign.objectives.policy_gradient import gaussian_kl, group_advantages, zero_spread
from diffalign.objectives.rewards import Rewards
from diffalign.types import Cond, Key, Metrics, PromptBatch, RecentMetrics


class Moves(NamedTuple):
    """One transition of N samples, with what its loss needs.

    number       which step of the sampler
    transition   the transition at the rollout, without gradients
    cond         batch of N
    keys         N keys
    log_p        log density of the transition at the rollout [N]
    advantage    [N]
    scores       [N]
    idle         whether all rewards of the sample's group were equal [N]
    """

    number: int
    transition: Transition
    cond: Cond
    keys: Sequence[Key]
    log_p: Tensor
    advantage: Tensor
    scores: Tensor
    idle: Tensor


class Rollout(NamedTuple):
    """The trained transitions of a micro-batch of prompts, and the keys of the prompts."""

    moves: list[Moves]
    keys: Sequence[Key]


class PolicyGradient(Algorithm):
    """Policy gradient on the transitions of a stochastic sampler.

    Positional: the policy, the frozen reference, the sampler, the rewards (gradients not needed), and the number of
    micro-batches in a rollout, which is `trainer.grad_accum`.
    """

    shown = ("policy/loss", "policy/reward")

    def __init__(
        self,
        policy: nn.Module,
        reference: Network,
        sampler: Sampler,
        rewards: Rewards,
        micro_batches: int,
        *,
        group_size: int,
        spread: Literal["group", "batch"],
        kl_weight: float,
        updates: int,
        chunk: int | None,
    ):
        if sampler.law == "deterministic" or len(sampler) < 2:
            raise ValueError(
                f"policy gradients need stochastic transitions; this sampler has {len(sampler)} steps of kind "
                f"'{sampler.law}', and the last one is always deterministic: set 'sampler.steps' to 2 or more and "
                "'sampler.law' to ancestral or renoise (flow models: sde or cps)"
            )
        self.players = {"policy": policy}
        self.policy, self.reference, self.sampler, self.rewards = policy, reference, sampler, rewards
        self.micro_batches, self.group_size, self.spread = micro_batches, group_size, spread
        self.kl_weight, self.repeats, self.chunk = kl_weight, updates, chunk

    @staticmethod
    def check(cfg: dict[str, Any]) -> list[str]:
        """Problems with an `algorithm` section, one line each."""
        problems = []
        if cfg["group_size"] < 2:
            problems.append(
                f"'algorithm.group_size' = {cfg['group_size']} must be 2 or more: advantages compare images"
            )
        if cfg["kl_weight"] < 0:
            problems.append(f"'algorithm.kl_weight' = {cfg['kl_weight']} must be 0 or more")
        if cfg["updates"] < 1:
            problems.append(f"'algorithm.updates' = {cfg['updates']} must be 1 or more")
        if cfg["chunk"] is not None and (cfg["chunk"] < 1 or cfg["group_size"] % cfg["chunk"]):
            problems.append(f"'algorithm.chunk' = {cfg['chunk']} must divide 'algorithm.group_size'")
        return problems

    @abstractmethod
    def policy_loss(self, moves: Moves, log_p: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Scalar loss of one transition, from its log density [N], mean and std under the policy now."""

    def trained(self, key: Key) -> Sequence[int]:
        """Indices of the stochastic, trained transitions of the rollout whose first prompt has this key."""
        return range(len(self.sampler) - 1)

    def turns(self, step: int) -> Sequence[Turn]:
        """One optimizer step for each update on the same rollout."""
        return (Turn("policy", self.loss),) * self.repeats

    def batches(self, loader: Iterator[PromptBatch]) -> Iterator[Rollout]:
        """Roll out the micro-batches of a training step, then yield them once for each update."""
        while True:
            rollouts = [self.roll_out(batch) for batch in itertools.islice(loader, self.micro_batches)]
            for _ in range(self.repeats):
                yield from rollouts

    @torch.no_grad()
    def roll_out(self, batch: PromptBatch) -> Rollout:
        """Sample `group_size` images of each prompt from the current policy, score them, compute advantages."""
        keys: list[Key] = [(key, k) for k in range(self.group_size) for key in batch.keys]
        cond, trained = batch.cond.repeat(self.group_size), self.trained(batch.keys[0])
        transitions = self.sampler.walk(self.policy, cond, keys, stochastic=trained)
        scores = self.rewards.score(transitions[-1].x_next, [*batch.prompts] * self.group_size)
        groups = torch.arange(len(batch.keys), device=scores.device).repeat(self.group_size)
        advantage = group_advantages(scores, groups, global_std=self.spread == "batch")
        idle = zero_spread(scores, groups)
        found = []
        for k in trained:
            log_p = self.log_density(transitions[k].x_next, transitions[k].mean, transitions[k].std)
            found.append(Moves(k, transitions[k], cond, keys, log_p, advantage, scores, idle))
        return Rollout(found, list(batch.keys))

    def log_density(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Log density [N] of a transition, averaged over C, h, w; of a CPS step without variance and constants."""
        return squared_log_prob(x, mean) if self.sampler.law == "cps" else log_prob(x, mean, std)

    def split(self, batch: Rollout) -> Sequence[Moves]:
        """The transitions, in chunks of `chunk` samples: each has its own forward and backward pass."""
        return [part for moves in batch.moves for part in chunks(moves, self.chunk)]

    def loss(self, batch: Moves) -> tuple[Tensor, Metrics]:
        """One transition of N samples -> loss, and metrics."""
        p = batch.transition
        mean, std = self._step(self.policy, batch)
        log_p = self.log_density(p.x_next, mean, std)
        loss = self.policy_loss(batch, log_p, mean, std)
        ratio = (log_p - batch.log_p).detach().exp()
        metrics = {"reward": batch.scores, "ratio_error": (ratio - 1).abs(), "idle": batch.idle.float()}
        if self.kl_weight:
            with torch.no_grad():
                reference_mean, _ = self._step(self.reference, batch)
            kl = gaussian_kl(mean, reference_mean, std)
            loss, metrics["kl"] = loss + self.kl_weight * kl.mean(), kl.detach()
        return loss, metrics

    def _step(self, network: Network, batch: Moves) -> tuple[Tensor, Tensor]:
        p, level = batch.transition, self.sampler.level_pairs[batch.number][0]
        out = self.sampler.predict(network, p.x_t, p.t, batch.cond)
        return self.sampler.step(out, p.x_t, p.t, p.t_next, [(key, level) for key in batch.keys])

    def state(self) -> dict[str, Tensor]:
        return self.rewards.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.rewards.load(state)

    def verdict(self, recent: RecentMetrics) -> str:
        return (
            f"verdict: reward {recent.formatted('policy/reward')}; {recent.formatted('policy/idle', '.0%')} of the "
            "samples taught nothing because all rewards of their group were equal; judge the images with another "
            "scorer: eval/win_rate.py"
        )


def chunks(moves: Moves, size: int | None) -> list[Moves]:
    """Moves of N samples in parts of `size` samples each; one part when left out."""
    count = len(moves.advantage)
    if size is None or size >= count:
        return [moves]

    def part(rows: slice) -> Moves:
        transition = Transition._make(x[rows] for x in moves.transition)
        cond = Cond._make(None if x is None else x[rows] for x in moves.cond)
        return Moves(moves.number, transition, cond, moves.keys[rows], *(x[rows] for x in moves[4:]))

    return [part(slice(k, k + size)) for k in range(0, count, size)]
