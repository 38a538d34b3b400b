"""Fine-tuning on the winners of preference pairs, the baseline, or on a folder of captioned images.

    accelerate launch train/sft.py --config configs/sft/sd15.yaml data.path=/data/pickapic_v2
    accelerate launch train/sft.py --config configs/sft/sd15.yaml data.path=photos
    diffalign train sft --config playground run.folder=runs/sft

Writes <run.folder>/: config.yaml, metrics.jsonl, samples/, checkpoints/ and export/, which stock diffusers loads.
"""

from __future__ import annotations

from diffalign import config
from diffalign.algorithms.sft import SFT
from diffalign.commands import program
from diffalign.data import Winners
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
        data=Winners,
        noising=Noising,
        algorithm=SFT,
        optimizer=make_player,
        trainer=Trainer,
        hooks=standard_hooks,
    )
    run, backbone = recipe.begin(cfg)
    images = run.latents(Winners, backbone, **cfg.data)
    parts = recipe.Parts(cfg, run, backbone, images, reference=None)
    algorithm = SFT(parts.policy, parts.noising)
    parts.fit(algorithm)


if __name__ == "__main__":
    program.run(main)
