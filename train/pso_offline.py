"""PSO (Miao et al., 2024), offline: preference pairs for a distilled model, at its own timesteps.

    accelerate launch train/pso_offline.py --config configs/pso_offline/sdxl_turbo.yaml data.path=/data/pickapic_v2
    diffalign train pso_offline --config playground run.folder=runs/pso_offline

That is Diffusion-DPO on errors of the noise, at no other timesteps than those at which the model samples.
Writes <run.folder>/: config.yaml, metrics.jsonl, samples/, checkpoints/ and export/, which stock diffusers loads.
"""

from __future__ import annotations

import math

from tqdm import tqdm

from diffalign import config
from diffalign.algorithms.diffusion_dpo import DiffusionDPO
from diffalign.commands import program
from diffalign.data import PreferencePairs
from diffalign.networks.loading import load_backbone
from diffalign.networks.reference import reference_for
from diffalign.networks.sampler import Sampler
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
        sampler=Sampler,
        algorithm=DiffusionDPO,
        optimizer=adamw,
        trainer=Trainer,
        hooks=standard_hooks,
    )
    run = Run(cfg, **cfg.run)
    backbone = load_backbone(run.placement, **cfg.backbone)
    resolution = cfg.data["resolution"]
    pairs = run.latents(PreferencePairs, backbone, **cfg.data)
    sampler = Sampler(backbone, run.draws, resolution, **cfg.sampler)
    noising = sampler.noising()
    reference = reference_for(backbone.denoiser)  # adapters off, or a frozen copy
    policy = run.prepare(backbone.denoiser)
    dims = math.prod(backbone.latent_shape(resolution))
    algorithm = DiffusionDPO(policy, reference, noising, dims, **cfg.algorithm)
    players = {"policy": adamw(policy, **cfg.optimizer)}
    hooks = standard_hooks(run, backbone, resolution, algorithm, sampler, **cfg.hooks)
    backbone.release()  # latents and embeddings are cached: no autoencoder, no text encoder while training
    loader = run.loader(pairs)
    if pairs.draws_per_sample:
        algorithm.remember_reference(tqdm(loader.once(), "reference", disable=not run.main), run.gather)
    del reference
    Trainer(run, algorithm, players, hooks, **cfg.trainer).fit(loader)


if __name__ == "__main__":
    program.run(main)
