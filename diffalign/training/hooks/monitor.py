"""Watches a run that climbs rewards for the ways in which rewards are hacked, and says so in plain words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.data.prompts import find_prompts
from diffalign.networks.families.base import Backbone
from diffalign.networks.sampler import Sampler
from diffalign.objectives.rewards import Rewards
from diffalign.training.hooks.samples import drawn
from diffalign.training.run import Run
from diffalign.training.trainer import Hook, Trainer
from reward_models.images import diversity

LIMITS = {
    "saturation": (1.25, "colours are {:.0%} more saturated than at the start"),
    "contrast": (1.25, "contrast is {:.0%} higher than at the start"),
    "high_frequency": (1.5, "fine noise or texture is {:.0%} stronger than at the start"),
}
"""Measure -> how many times its start it may reach, and what is said beyond."""
CHUNK = 8
"""Prompts whose samples are measured at a time, at most."""
LEAST_DIVERSITY = 0.5
MOST_CLAMPED = 0.05


class Monitor(Hook):
    """Looks at samples of fixed prompts and noise, before the first step and every so many steps.

    Positional: the run, the backbone, its sampler, the rewards that are trained on, and what loads scorers by name.

    `metrics.jsonl` gets monitor/saturation, contrast, high_frequency, clamped, diversity (the distance of samples of
    one prompt), warnings (how many), trained_gain and held_out_gain: how far the mean score rose, in standard
    deviations of the scores at the start.

    Args:
        prompts: .txt or .jsonl of prompts that are not trained on, or playground; nothing is watched without
        prompt_count: how many of them, each drawn twice
        held_out: a scorer that is never trained on (name, folder or package.module:Class)
        every: steps between looks
        stop: end the run at the first warning
    """

    def __init__(
        self,
        run: Run,
        backbone: Backbone,
        sampler: Sampler,
        rewards: Rewards,
        load_mixture: Callable[..., Any],
        *,
        prompts: str | None = None,
        prompt_count: int = 32,
        held_out: str | None = None,
        every: int = 50,
        stop: bool = False,
    ):
        self.run, self.backbone, self.sampler, self.rewards = run, backbone, sampler, rewards
        self.every, self.stop, self.warned = every, stop, list[int]()
        self.scorer = load_mixture(run.device, scorers=(held_out,)) if held_out and prompts else None
        self.prompts: list[str] = []
        if prompts:
            self.prompts = list(find_prompts(prompts, held_out=True).values())[:prompt_count]
            self.cond = backbone.encode_text(self.prompts)
        self.before: dict[str, Tensor] = {}
        self.best: dict[str, Tensor] = {}  # the look that the held-out scorer liked most

    @staticmethod
    def check(cfg: dict[str, Any]) -> list[str]:
        """What cannot work in a `monitor` section, one line each."""
        problems = [f"'monitor.{k}' = {cfg[k]} must be 1 or more" for k in ("every", "prompt_count") if cfg[k] < 1]
        if cfg["prompts"] is None:
            return problems
        try:
            find_prompts(cfg["prompts"], held_out=True)
        except (FileNotFoundError, ValueError) as error:
            problems.append(f"'monitor.prompts': {error}")
        return problems

    def start(self, trainer: Trainer) -> None:
        """Measure the model as it begins; a resumed run has read what was measured then from its checkpoint."""
        if self.prompts and trainer.step == 0:
            self.before = self.best = self._measure()
            self._warn(trainer, self.before)

    def state(self) -> dict[str, Tensor]:
        """The looks that later ones are compared with, and the steps of the warnings."""
        looks = {"before": self.before, "best": self.best}
        found = {f"{look}/{name}": value.clone() for look, values in looks.items() for name, value in values.items()}
        return found | {"warned": torch.tensor(self.warned, dtype=torch.int64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state()`."""
        self.before, self.best = (
            {k.removeprefix(look): v for k, v in state.items() if k.startswith(look)} for look in ("before/", "best/")
        )
        self.warned = state["warned"].tolist()

    def after_step(self, trainer: Trainer) -> None:
        if self.prompts and (trainer.step % self.every == 0 or trainer.last):
            self._warn(trainer, self._measure())

    def end(self, trainer: Trainer) -> None:
        if self.warned:
            self.run.print(f"{len(self.warned)} warnings of the monitor, the first at step {self.warned[0]}")

    def _measure(self) -> dict[str, Tensor]:
        """Every measure of each sample [2N], or pair of samples [N], on the CPU. The ranks share the prompts, and every
        rank gets all of the measures, so that all come to the same conclusions."""
        accelerator, n = self.run.accelerator, len(self.prompts)
        size = min(CHUNK, -(-n // accelerator.num_processes))
        chunks = [range(i, min(i + size, n)) for i in range(0, n, size)]
        mine = chunks[accelerator.process_index :: accelerator.num_processes]
        parts = sorted(self.run.gather([(chunk.start, self._look(chunk)) for chunk in mine]))
        return {name: torch.cat([part[name] for _, part in parts], dim=1).flatten() for name in parts[0][1]}

    @torch.no_grad()
    def _look(self, chunk: range) -> dict[str, Tensor]:
        """Every measure of both samples of some prompts: [2, n], or [1, n] of the pair, on the CPU."""
        prompts = [self.prompts[i] for i in chunk] * 2
        keys = [(i // len(chunk), prompt) for i, prompt in enumerate(prompts)]
        images: list[Tensor] = []
        trained, held_out = [], []
        for some in drawn(self.backbone, self.sampler, self.cond.at(torch.tensor(chunk).repeat(2)), keys):
            done = sum(len(x) for x in images)
            theirs = prompts[done : done + len(some)]
            images.append(some)
            trained.append(self.rewards.raw_scores(some, theirs))
            if self.scorer is not None:
                held_out.append(self.scorer.score(some, theirs))
        found = {**image_statistics(torch.cat(images)), "trained": torch.cat(trained)}
        if held_out:
            found["held_out"] = torch.cat(held_out)
        return {name: value.float().cpu().reshape(-1, len(chunk)) for name, value in found.items()}

    def _warn(self, trainer: Trainer, now: dict[str, Tensor]) -> None:
        """Log the measures and say what is suspicious about them."""
        values = {k: v.mean() for k, v in now.items() if k not in ("trained", "held_out")}
        gains = {k: (now[k] - self.before[k]) / self.before[k].std() for k in ("trained", "held_out") if k in now}
        values |= {f"{k}_gain": v.mean() for k, v in gains.items()}
        said = hacking_signs(self.before, self.best, now)
        values["warnings"] = torch.tensor(float(len(said)))
        self.run.log(trainer.step, {f"monitor/{k}": v for k, v in values.items()})
        if "held_out" in now and now["held_out"].mean() > self.best["held_out"].mean():
            self.best = now
        for line in said:
            self.run.print(f"step {trainer.step}: {line}")
        if said:
            self.warned.append(trainer.step)
            if self.stop:
                trainer.stop = f"the monitor warned: {said[0]}"


def image_statistics(pixels: Tensor) -> dict[str, Tensor]:
    """Images [2N, 3, H, W] in [0, 1], first and last N of the same prompts -> measures [2N], diversity [N]."""
    grey = pixels.mean(1, keepdim=True)
    smooth = F.avg_pool2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return {
        "saturation": (pixels.amax(1) - pixels.amin(1)).flatten(1).mean(1),
        "contrast": grey.flatten(1).std(1),
        "high_frequency": (grey - smooth).square().flatten(1).mean(1),
        "clamped": ((pixels <= 0) | (pixels >= 1)).float().flatten(1).mean(1),
        "diversity": diversity(torch.stack(pixels.chunk(2))),
    }


def hacking_signs(before: Mapping[str, Tensor], best: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> list[str]:
    """What the measures say about reward hacking, in plain words; empty for nothing.

    Those of the look of images are compared with before, the held-out scorer's with its best.
    """
    said = []
    for name, (limit, words) in LIMITS.items():
        times = (now[name].mean() / before[name].mean().clamp(min=1e-6)).item()
        if times > limit:
            said.append(f"{words.format(times - 1)}; rewards may be hacked by it")
    if (less := (now["diversity"].mean() / before["diversity"].mean().clamp(min=1e-6)).item()) < LEAST_DIVERSITY:
        said.append(f"samples of one prompt differ by {less:.0%} of what they did; the model is losing its diversity")
    if (more := (now["clamped"].mean() - before["clamped"].mean()).item()) > MOST_CLAMPED:
        said.append(f"{more:.1%} more of the pixels are clamped than at the start; images are over-saturated")
    if "held_out" in now:
        lost, won = now["held_out"] - best["held_out"], now["trained"] - best["trained"]
        if lost.mean() < -2 * lost.std() / len(lost) ** 0.5 and won.mean() > 0:
            fall = -(lost.mean() / before["held_out"].std()).item()
            said.append(
                f"the held-out scorer fell by {fall:.2f} standard deviations from its best "
                "while the trained reward rose: this is reward hacking; stop, or anchor the model more strongly"
            )
    return said
