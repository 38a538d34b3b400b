"""HPS-style scorer (Wu et al., 2023): a CLIP model fine-tuned on pairs and rankings of images of one prompt.

    accelerate launch train/hps.py --config configs/hps/hpsv2.yaml data.path=HPD/train.json
    diffalign train hps --config playground data.path=ratings run.folder=runs/scorer

Writes <run.folder>/: config.yaml, metrics.jsonl, validation.jsonl, checkpoints/ and export/, the best weights, which
`reward-score --scorer <run.folder>/export` and `load_scorer` read.
"""

from __future__ import annotations

from diffalign import config
from diffalign.algorithms.reward_training import RewardTraining
from diffalign.commands import program
from diffalign.data.groups import PreferenceGroups
from diffalign.training import recipe
from diffalign.training.hooks.logit_scale import LimitLogitScale
from diffalign.training.hooks.validation import scorer_hooks
from diffalign.training.optim import make_player
from diffalign.training.run import Run
from diffalign.training.trainer import Trainer
from reward_models.training import clip_to_train, prepare


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(
        argv,
        __file__,
        run=Run,
        scorer=clip_to_train,
        data=PreferenceGroups,
        algorithm=RewardTraining,
        optimizer=make_player,
        trainer=Trainer,
        hooks=scorer_hooks,
    )
    run = Run(cfg, **cfg.run)
    scorer = clip_to_train(run.device, **cfg.scorer)
    groups, validation = (run.groups(prepare(scorer.rule), part, **cfg.data) for part in ("train", "validation"))
    algorithm = RewardTraining(run.prepare(scorer), run.draws, groups.aspects, **cfg.algorithm)
    recipe.fit_scorer(cfg, run, scorer, algorithm, groups, validation, hooks=[LimitLogitScale(scorer)])


if __name__ == "__main__":
    program.run(main)
