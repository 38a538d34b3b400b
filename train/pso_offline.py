"""PSO (Miao et al., 2024), offline: preference pairs for a distilled model, at its own timesteps.

    accelerate launch train/pso_offline.py --config configs/pso_offline/sdxl_turbo.yaml data.path=/data/pickapic_v2
    diffalign train pso_offline --config playground run.folder=runs/pso_offline

This is Diffusion-DPO on noise-prediction errors, restricted to the sampler's timesteps.
Writes <run.folder>/: config.yaml, metrics.jsonl, samples/, checkpoints/ and export/, which stock diffusers loads.
"""

from __future__ import annotations

from diffalign import config
from diffalign.algorithms.diffusion_dpo import DiffusionDPO
from diffalign.commands import program
from diffalign.data import PreferencePairs
from diffalign.networks.loading import load_backbone
from diffalign.networks.sampler import Sampler
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
        data=PreferencePairs,
        sampler=Sampler,
        algorithm=DiffusionDPO,
        optimizer=make_player,
        trainer=Trainer,
        hooks=standard_hooks,
    )
    run, backbone = recipe.begin(cfg)
    pairs = run.latents(PreferencePairs, backbone, **cfg.data)
    parts = recipe.Parts(cfg, run, backbone, pairs)
    noising = parts.sampler.noising()  # restricted to the sampler's timesteps
    algorithm = DiffusionDPO(parts.policy, parts.reference, noising, parts.dims, **cfg.algorithm)
    parts.fit(algorithm)


if __name__ == "__main__":
    program.run(main)
