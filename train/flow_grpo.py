"""Flow-GRPO (Liu et al., 2025): policy gradient on stochastic steps of a flow model, with any scorer.

    accelerate launch train/flow_grpo.py --config configs/flow_grpo/sd3.yaml data.path=prompts.txt
    diffalign train flow_grpo --config playground run.folder=runs/flow_grpo

Writes <run.folder>/: config.yaml, metrics.jsonl, samples/, checkpoints/ and export/, which stock diffusers loads.
"""

from __future__ import annotations

from diffalign import config
from diffalign.algorithms.flow_grpo import FlowGRPO
from diffalign.algorithms.rollouts import Rollouts
from diffalign.commands import program
from diffalign.data import Prompts
from diffalign.networks.loading import load_backbone
from diffalign.networks.sampler import Sampler
from diffalign.training import recipe
from diffalign.training.hooks.monitor import Monitor
from diffalign.training.hooks.standard import standard_hooks
from diffalign.training.optim import make_player
from diffalign.training.run import Run
from diffalign.training.trainer import Trainer
from reward_models import load_mixture


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(
        argv,
        __file__,
        run=Run,
        backbone=load_backbone,
        data=Prompts,
        sampler=Sampler,
        reward=load_mixture,
        rollouts=Rollouts,
        algorithm=FlowGRPO,
        optimizer=make_player,
        trainer=Trainer,
        monitor=Monitor,
        hooks=standard_hooks,
    )
    run, backbone = recipe.begin(cfg)
    prompts = run.prompts(backbone, **cfg.data)
    parts = recipe.Parts(cfg, run, backbone, prompts)
    rollouts = cfg.make("rollouts", parts.sampler, parts.rewards, cfg.trainer["grad_accum"])
    algorithm = FlowGRPO(parts.policy, parts.reference, rollouts, **cfg.algorithm)
    parts.fit(algorithm)


if __name__ == "__main__":
    program.run(main)
