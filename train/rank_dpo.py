"""RankDPO (Karthik et al., 2024) on groups of ranked images.

    accelerate launch train/rank_dpo.py --config configs/rank_dpo/sdxl.yaml data.path=/data/ranked.jsonl
    diffalign train rank_dpo --config playground run.folder=runs/rank

Writes <run.folder>/: config.yaml, metrics.jsonl, samples/, checkpoints/ and export/, which stock diffusers loads.
"""

from __future__ import annotations

import math

from tqdm import tqdm

from diffalign import config
from diffalign.algorithms.rank_dpo import RankDPO
from diffalign.commands import program
from diffalign.data import RankedImages
from diffalign.diffusion.noising import Noising
from diffalign.networks.loading import load_backbone
from diffalign.networks.reference import reference_for
from diffalign.training.hooks.standard import standard_hooks
from diffalign.training.optim import adamw
from diffalign.training.run import Run
from diffalign.training.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(
        argv,
        __file__,
        run=Run,
        backbone=load_backbone,
        data=RankedImages,
        noising=Noising,
        algorithm=RankDPO,
        optimizer=adamw,
        trainer=Trainer,
        hooks=standard_hooks,
    )
    run = Run(cfg, **cfg.run)
    backbone = load_backbone(run.placement, **cfg.backbone)
    groups = run.latents(RankedImages, backbone, **cfg.data)
    noising = Noising(backbone.schedule, run.draws, **cfg.noising)
    reference = reference_for(backbone.denoiser)  # adapters off, or a frozen copy
    policy = run.prepare(backbone.denoiser)
    dims = math.prod(backbone.latent_shape(cfg.data["resolution"]))
    algorithm = RankDPO(policy, reference, noising, dims, **cfg.algorithm)
    players = {"policy": adamw(policy, **cfg.optimizer)}
    hooks = standard_hooks(run, backbone, cfg.data["resolution"], **cfg.hooks)
    backbone.release()  # latents and embeddings are cached: no autoencoder, no text encoder while training
    loader = run.loader(groups)
    if groups.draws_per_sample:
        algorithm.remember_reference(tqdm(loader.once(), "reference", disable=not run.main), run.gather)
    del reference
    Trainer(run, algorithm, players, hooks, **cfg.trainer).fit(loader)


if __name__ == "__main__":
    program.run(main)
