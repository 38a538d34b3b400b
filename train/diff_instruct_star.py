"""Diff-Instruct* (Luo et al., 2024): a few-step generator, rewarded and held to a diffusion model by its scores.

    accelerate launch train/diff_instruct_star.py --config configs/diff_instruct_star/sdxl_dmd2.yaml
    diffalign train diff_instruct_star --config playground run.folder=runs/diff_instruct_star

Writes <run.folder>/: config.yaml, metrics.jsonl, samples/, checkpoints/ and export/, which stock diffusers loads.
"""

from __future__ import annotations

from diffalign import config
from diffalign.algorithms.diff_instruct_star import DiffInstructStar
from diffalign.commands import program
from diffalign.data import Prompts
from diffalign.diffusion.noising import Noising
from diffalign.networks.loading import load_backbone
from diffalign.networks.sampler import Sampler
from diffalign.networks.scores import score_networks
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
        teacher=load_backbone,
        data=Prompts,
        sampler=Sampler,
        reward=load_mixture,
        noising=Noising,
        algorithm=DiffInstructStar,
        optimizer=adamw,
        aux_optimizer=adamw,
        trainer=Trainer,
        monitor=Monitor,
        hooks=standard_hooks,
    )
    run = Run(cfg, **cfg.run)
    backbone = load_backbone(run.placement, **cfg.backbone)
    prompts = run.prompts(backbone, **cfg.data)
    sampler = Sampler(backbone, run.draws, cfg.data["resolution"], **cfg.sampler)
    rewards = Rewards(load_mixture(run.device, **cfg.reward), backbone.decode, run.gather)
    scores = score_networks(backbone, run.placement, cfg.backbone["path"], **cfg.teacher)
    noising = Noising(backbone.schedule, run.draws, **cfg.noising)
    generator, aux = run.prepare(backbone.denoiser), run.prepare(scores.aux)
    empty = backbone.encode_text([""])
    algorithm = DiffInstructStar(generator, aux, scores, sampler, noising, empty, rewards, **cfg.algorithm)
    players = {"generator": adamw(generator, **cfg.optimizer), "aux": adamw(aux, **cfg.aux_optimizer)}
    monitor = Monitor(run, backbone, sampler, rewards, load_mixture, **cfg.monitor)
    hooks = standard_hooks(run, backbone, cfg.data["resolution"], algorithm, sampler, monitor, **cfg.hooks)
    backbone.release()  # text is encoded; the autoencoder loads again when a sample is decoded
    Trainer(run, algorithm, players, hooks, **cfg.trainer).fit(run.loader(prompts))


if __name__ == "__main__":
    program.run(main)
