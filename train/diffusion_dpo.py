"""Diffusion-DPO (Wallace et al., 2023) on preference pairs, and every loss on its margin.

    accelerate launch train/diffusion_dpo.py --config configs/diffusion_dpo/sd15.yaml algorithm.beta=2000
    diffalign train diffusion_dpo --config playground run.folder=runs/first

Writes <run.folder>/: config.yaml, metrics.jsonl, samples/, checkpoints/ and export/, which stock diffusers loads.
"""

from __future__ import annotations

import math

from tqdm import tqdm

from diffalign import config
from diffalign.algorithms.diffusion_dpo import DiffusionDPO
from diffalign.commands import program
from diffalign.data import PreferencePairs
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
        data=PreferencePairs,
        noising=Noising,
        algorithm=DiffusionDPO,
        optimizer=adamw,
        trainer=Trainer,
        hooks=standard_hooks,
    )
    run = Run(cfg, **cfg.run)
    backbone = load_backbone(run.placement, **cfg.backbone)
    pairs = run.latents(PreferencePairs, backbone, **cfg.data)
    noising = Noising(backbone.schedule, run.draws, **cfg.noising)
    reference = reference_for(backbone.denoiser)  # adapters off, or a frozen copy
    policy = run.prepare(backbone.denoiser)
    dims = math.prod(backbone.latent_shape(cfg.data["resolution"]))
    algorithm = DiffusionDPO(policy, reference, noising, dims, **cfg.algorithm)
    players = {"policy": adamw(policy, **cfg.optimizer)}
    hooks = standard_hooks(run, backbone, cfg.data["resolution"], **cfg.hooks)
    backbone.release()  # latents and embeddings are cached: no autoencoder, no text encoder while training
    loader = run.loader(pairs)
    if pairs.draws_per_sample:
        algorithm.remember_reference(tqdm(loader.once(), "reference", disable=not run.main), run.gather)
    del reference
    Trainer(run, algorithm, players, hooks, **cfg.trainer).fit(loader)


if __name__ == "__main__":
    program.run(main)
