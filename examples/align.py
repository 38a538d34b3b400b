"""Align a model from Python: Diffusion-DPO with a LoRA, on the shipped model and the shipped preference pairs.

    python examples/align.py runs/from_python

`train/diffusion_dpo.py` does the same, with every setting in a config file. Writes FOLDER/: config.yaml (empty here),
metrics.jsonl, checkpoints/ and export/, which `pipe.load_lora_weights` of stock diffusers reads.
"""

from __future__ import annotations

import math
import sys

from diffalign.algorithms.diffusion_dpo import DiffusionDPO
from diffalign.config import Config
from diffalign.data import PreferencePairs
from diffalign.diffusion.noising import Noising
from diffalign.networks.loading import load_backbone
from diffalign.networks.reference import reference_for
from diffalign.training.hooks.standard import standard_hooks
from diffalign.training.optim import make_player
from diffalign.training.run import Run
from diffalign.training.trainer import Trainer


def align(folder: str, steps: int = 100, resolution: int = 32) -> None:
    """Train for so many steps and export the LoRA to <folder>/export."""
    run = Run(Config({}), folder=folder)  # the accelerator, the seed and the metrics
    backbone = load_backbone(run.placement, path="playground", lora_rank=8)  # a folder or hub id of your own here
    pairs = run.latents(PreferencePairs, backbone, path="playground", resolution=resolution, batch_size=16, limit=256)

    reference = reference_for(backbone.denoiser)  # the same network with the LoRA off
    policy = run.prepare(backbone.denoiser)  # as accelerate wraps it for several GPUs
    noising = Noising(backbone.schedule, run.draws)  # timesteps and noise of each pair
    dims = math.prod(backbone.latent_shape(resolution))
    algorithm = DiffusionDPO(policy, reference, noising, dims, beta=500.0)

    players = {"policy": make_player(policy, lr=3e-4, lr_warmup_steps=10)}
    hooks = standard_hooks(run, backbone, resolution, verify_export=False)
    backbone.release()  # images and prompts are encoded: the autoencoder and the text encoder leave the memory
    Trainer(run, algorithm, players, hooks, steps=steps).fit(run.loader(pairs))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/align.py FOLDER")
    align(sys.argv[1])
