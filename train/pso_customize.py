"""PSO (Miao et al., 2024) for a style or a subject: given images against a distilled model's own samples.

    accelerate launch train/pso_customize.py --config configs/pso_customize/sdxl_turbo.yaml data.path=images/
    diffalign train pso_customize --config playground run.folder=runs/style data.path=images/

images/ holds the images and their captions: metadata.jsonl, a .txt beside each, or one prompt.txt for all ("a photo of
[V] dog"; then set subject.prompt="a photo of a dog", the prompt of the rejected samples).
Writes <run.folder>/: config.yaml, metrics.jsonl, samples/, checkpoints/ and export/, which stock diffusers loads.
"""

from __future__ import annotations

from diffalign import config
from diffalign.algorithms.pso import PSOCustomization, subject
from diffalign.commands import program
from diffalign.data import TargetImages
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
        data=TargetImages,
        subject=subject,
        sampler=Sampler,
        algorithm=PSOCustomization,
        optimizer=make_player,
        trainer=Trainer,
        hooks=standard_hooks,
    )
    run, backbone = recipe.begin(cfg)
    targets = run.latents(TargetImages, backbone, **cfg.data)
    parts = recipe.Parts(cfg, run, backbone, targets)
    noising = parts.sampler.noising()  # restricted to the sampler's timesteps
    drawn_from = subject(backbone.encode_text, **cfg.subject)
    algorithm = PSOCustomization(
        parts.policy, parts.reference, noising, parts.dims, parts.sampler, drawn_from, **cfg.algorithm
    )
    parts.fit(algorithm)


if __name__ == "__main__":
    program.run(main)
