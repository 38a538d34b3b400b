"""Diff-Instruct (Luo et al., 2023): distil a model into a one-step or few-step generator, from prompts alone.

    accelerate launch train/distill.py --config configs/distill/sd15.yaml data.path=prompts.txt
    diffalign train distill --config playground run.folder=runs/student

Writes <run.folder>/: config.yaml, metrics.jsonl, samples/, checkpoints/ and export/, which stock diffusers loads with
the few-step scheduler of the student.
"""

from __future__ import annotations

from diffalign import config
from diffalign.algorithms.diff_instruct_star import DiffInstructStar
from diffalign.commands import program
from diffalign.data import Prompts
from diffalign.diffusion.noising import Noising
from diffalign.networks.loading import load_backbone
from diffalign.networks.sampler import Sampler
from diffalign.networks.schedulers import few_step_scheduler
from diffalign.networks.score_networks import score_networks
from diffalign.training import recipe
from diffalign.training.hooks.standard import standard_hooks
from diffalign.training.optim import make_player
from diffalign.training.run import Run
from diffalign.training.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(
        argv,
        __file__,
        run=Run,
        backbone=load_backbone,
        teacher=load_backbone,
        data=Prompts,
        sampler=Sampler,
        noising=Noising,
        algorithm=DiffInstructStar,
        optimizer=make_player,
        aux_optimizer=make_player,
        trainer=Trainer,
        hooks=standard_hooks,
    )
    run, backbone = recipe.begin(cfg)
    backbone.scheduler_config = few_step_scheduler(backbone.scheduler_config)
    prompts = run.prompts(backbone, **cfg.data)
    scores = score_networks(backbone, run.placement, cfg.backbone["path"], **cfg.teacher)
    parts = recipe.Parts(cfg, run, backbone, prompts, reference=None)  # the frozen teacher is in scores
    generator, aux = parts.policy, run.prepare(scores.aux)
    algorithm = DiffInstructStar(generator, aux, scores, parts.sampler, parts.noising, parts.empty, **cfg.algorithm)
    parts.fit(algorithm)


if __name__ == "__main__":
    program.run(main)
