"""Diffusion-KTO (Li et al., 2024) on single images labelled as liked or disliked.

    accelerate launch train/kto.py --config configs/kto/sd15.yaml data.path=/data/pickapic_v2
    diffalign train kto --config playground run.folder=runs/kto

Writes <run.folder>/: config.yaml, metrics.jsonl, samples/, checkpoints/ and export/, which stock diffusers loads.
"""

from __future__ import annotations

from diffalign import config
from diffalign.algorithms.kto import KTO
from diffalign.commands import program
from diffalign.data import Balanced, LikedImages
from diffalign.diffusion.noising import Noising
from diffalign.networks.loading import load_backbone
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
        data=LikedImages,
        balance=Balanced,
        noising=Noising,
        algorithm=KTO,
        optimizer=make_player,
        trainer=Trainer,
        hooks=standard_hooks,
    )
    run, backbone = recipe.begin(cfg)
    images = Balanced(run.latents(LikedImages, backbone, **cfg.data), run.draws, **cfg.balance)
    parts = recipe.Parts(cfg, run, backbone, images)
    algorithm = KTO(parts.policy, parts.reference, parts.noising, parts.dims, run.mean, **cfg.algorithm)
    parts.fit(algorithm)


if __name__ == "__main__":
    program.run(main)
