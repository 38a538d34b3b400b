"""Diffusion-DPO (Wallace et al., 2023) on preference pairs.

    accelerate launch train/diffusion_dpo.py --config configs/diffusion_dpo/sd15.yaml algorithm.beta=2000
    diffalign train diffusion_dpo --config playground run.folder=runs/first

Writes <run.folder>/: config.yaml, metrics.jsonl, samples/, checkpoints/ and export/, which stock diffusers loads.
"""

from __future__ import annotations

import math

from tqdm import tqdm

from diffalign import config
from diffalign.algorithms.diffusion_dpo import DiffusionDPO
from diffalign.backbones import check_backbone, load_backbone
from diffalign.data import PreferencePairs, check_pairs
from diffalign.hooks import standard_hooks
from diffalign.reference import reference_for
from diffalign.run import Run
from diffalign.trainer import Trainer, adamw


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(
        argv,
        __file__,
        checks={"backbone": check_backbone, "data": check_pairs, "algorithm data": DiffusionDPO.check},
        run=Run,
        backbone=load_backbone,
        data=PreferencePairs,
        algorithm=DiffusionDPO,
        optimizer=adamw,
        trainer=Trainer,
        hooks=standard_hooks,
    )
    run = Run(cfg, **cfg.run)
    backbone = load_backbone(run.device, **cfg.backbone)
    pairs = run.pairs(backbone, **cfg.data)
    reference = reference_for(backbone.denoiser)  # adapters off, or a frozen copy
    policy = run.prepare(backbone.denoiser)
    dims = math.prod(backbone.latent_shape(cfg.data["resolution"]))
    algorithm = DiffusionDPO(policy, reference, backbone.schedule, run.draws, dims, **cfg.algorithm)
    players = {"policy": adamw(policy, **cfg.optimizer)}
    hooks = standard_hooks(run, backbone, cfg.data["resolution"], **cfg.hooks)
    backbone.release()  # latents and embeddings are cached: no autoencoder, no text encoder while training
    loader = run.loader(pairs)
    if pairs.draws_per_pair:
        algorithm.remember_reference(tqdm(loader.once(), "reference", disable=not run.main), run.gather)
    del reference
    Trainer(run, algorithm, players, hooks, **cfg.trainer).fit(loader)


if __name__ == "__main__":
    main()
