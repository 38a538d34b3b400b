"""VP-Score-style scorer (Wu et al., 2024; network of ImageReward, Xu et al., 2023): BLIP with a head for each aspect.

    accelerate launch train/vp_score.py --config configs/vp_score/image_reward.yaml data.path=ImageRewardDB
    diffalign train vp_score --config playground data.path=ratings run.folder=runs/scorer

Writes <run.folder>/: config.yaml, metrics.jsonl, validation.jsonl, checkpoints/ and export/, the best weights, which
`reward-score --scorer <run.folder>/export` and `load_scorer` read.
"""

from __future__ import annotations

from diffalign import config
from diffalign.algorithms.reward_training import RewardTraining
from diffalign.commands import program
from diffalign.data.groups import PreferenceGroups
from diffalign.training import recipe
from diffalign.training.hooks.validation import scorer_hooks
from diffalign.training.optim import make_player
from diffalign.training.run import Run
from diffalign.training.trainer import Trainer
from reward_models.training import blip_to_train, prepare


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(
        argv,
        __file__,
        run=Run,
        scorer=blip_to_train,
        data=PreferenceGroups,
        algorithm=RewardTraining,
        optimizer=make_player,
        trainer=Trainer,
        hooks=scorer_hooks,
    )
    run = Run(cfg, **cfg.run)
    scorer = blip_to_train(run.device, cfg.data["aspects"], **cfg.scorer)
    groups, validation = (run.groups(prepare(scorer.rule), part, **cfg.data) for part in ("train", "validation"))
    algorithm = RewardTraining(run.prepare(scorer), run.draws, groups.aspects, **cfg.algorithm)
    recipe.fit_scorer(cfg, run, scorer, algorithm, groups, validation)


if __name__ == "__main__":
    program.run(main)
