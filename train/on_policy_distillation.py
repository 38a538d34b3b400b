"""On-policy distillation: one LoRA learns from several LoRA experts on its own samples, from prompts alone.

    accelerate launch train/on_policy_distillation.py --config configs/on_policy_distillation/playground.yaml
    diffalign train on_policy_distillation --config playground teachers.paths=[colour/export,size/export]

Writes <run.folder>/: config.yaml, metrics.jsonl, samples/, checkpoints/ and export/, which stock diffusers loads.
"""

from __future__ import annotations

from diffalign import config
from diffalign.algorithms.on_policy_distillation import OnPolicyDistillation
from diffalign.commands import program
from diffalign.data import Prompts
from diffalign.networks.loading import load_backbone
from diffalign.networks.sampler import Sampler
from diffalign.networks.teachers import load_teachers
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
        teachers=load_teachers,
        data=Prompts,
        sampler=Sampler,
        algorithm=OnPolicyDistillation,
        optimizer=make_player,
        trainer=Trainer,
        hooks=standard_hooks,
    )
    run, backbone = recipe.begin(cfg)
    teachers = cfg.make("teachers", backbone)
    prompts = run.prompts(backbone, **cfg.data)
    parts = recipe.Parts(cfg, run, backbone, prompts)
    algorithm = OnPolicyDistillation(parts.policy, parts.reference, teachers, parts.sampler, **cfg.algorithm)
    parts.fit(algorithm)


if __name__ == "__main__":
    program.run(main)
