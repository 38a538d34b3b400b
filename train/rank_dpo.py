"""RankDPO (Karthik et al., 2024) on groups of ranked images.

    accelerate launch train/rank_dpo.py --config configs/rank_dpo/sdxl.yaml data.path=/data/ranked.jsonl
    diffalign train rank_dpo --config playground run.folder=runs/rank

Writes <run.folder>/: config.yaml, metrics.jsonl, samples/, checkpoints/ and export/, which stock diffusers loads.
"""

from __future__ import annotations

from diffalign import config
from diffalign.algorithms.rank_dpo import RankDPO
from diffalign.commands import program
from diffalign.data import RankedImages
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
        data=RankedImages,
        noising=Noising,
        algorithm=RankDPO,
        optimizer=make_player,
        trainer=Trainer,
        hooks=standard_hooks,
    )
    run, backbone = recipe.begin(cfg)
    groups = run.latents(RankedImages, backbone, **cfg.data)
    parts = recipe.Parts(cfg, run, backbone, groups)
    algorithm = RankDPO(parts.policy, parts.reference, parts.noising, parts.dims, **cfg.algorithm)
    parts.fit(algorithm)


if __name__ == "__main__":
    program.run(main)
