"""PSO (Miao et al., 2024), online: a distilled model compares pairs of its own samples by a scorer.

    accelerate launch train/pso.py --config configs/pso/sdxl_turbo.yaml data.path=prompts.txt
    diffalign train pso --config playground run.folder=runs/pso

Writes <run.folder>/: config.yaml, metrics.jsonl, samples/, checkpoints/ and export/, which stock diffusers loads.
"""

from __future__ import annotations

from diffalign import config
from diffalign.algorithms.pso import PSO
from diffalign.commands import program
from diffalign.data import Prompts
from diffalign.networks.loading import load_backbone
from diffalign.networks.reference import reference_for
from diffalign.networks.sampler import Sampler
from diffalign.objectives.rewards import Rewards
from diffalign.training.hooks.monitor import Monitor
from diffalign.training.hooks.standard import standard_hooks
from diffalign.training.optim import adamw
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
        algorithm=PSO,
        optimizer=adamw,
        trainer=Trainer,
        monitor=Monitor,
        hooks=standard_hooks,
    )
    run = Run(cfg, **cfg.run)
    backbone = load_backbone(run.placement, **cfg.backbone)
    prompts = run.prompts(backbone, **cfg.data)
    sampler = Sampler(backbone, run.draws, cfg.data["resolution"], **cfg.sampler)
    rewards = Rewards(load_mixture(run.device, **cfg.reward), backbone.decode, run.gather)
    reference = reference_for(backbone.denoiser)  # adapters off, or a frozen copy
    policy = run.prepare(backbone.denoiser)
    algorithm = PSO(policy, reference, sampler, rewards, **cfg.algorithm)
    players = {"policy": adamw(policy, **cfg.optimizer)}
    monitor = Monitor(run, backbone, sampler, rewards, load_mixture, **cfg.monitor)
    hooks = standard_hooks(run, backbone, cfg.data["resolution"], algorithm, sampler, monitor, **cfg.hooks)
    backbone.release()  # text is encoded; the autoencoder loads again when a sample is decoded
    Trainer(run, algorithm, players, hooks, **cfg.trainer).fit(run.loader(prompts))


if __name__ == "__main__":
    program.run(main)
