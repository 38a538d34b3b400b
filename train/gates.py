"""Gates that weigh LoRA experts by block and noise level (TLPO), trained on preference pairs.

    accelerate launch train/gates.py --config configs/gates/playground.yaml gates.experts=[runs/a/export,runs/b/export]
    diffalign train gates --config playground data.path=playground_own gates.experts=[colour/export,size/export]

Writes <run.folder>/: config.yaml, metrics.jsonl, checkpoints/ and export/: a LoRA for each interval of noise levels,
gates.json, and a README with the code that draws with them in stock diffusers. Weights set by hand: `diffalign merge`.
"""

from __future__ import annotations

from diffalign import config
from diffalign.algorithms.gates import GatedDPO
from diffalign.commands import program
from diffalign.data import PreferencePairs
from diffalign.diffusion.noising import Noising
from diffalign.networks.gates import load_experts
from diffalign.networks.loading import load_backbone
from diffalign.training import recipe
from diffalign.training.hooks.gates import GateExport, gate_hooks
from diffalign.training.optim import make_player
from diffalign.training.run import Run
from diffalign.training.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    cfg = config.parse(
        argv,
        __file__,
        run=Run,
        backbone=load_backbone,
        gates=load_experts,
        data=PreferencePairs,
        noising=Noising,
        algorithm=GatedDPO,
        optimizer=make_player,
        trainer=Trainer,
        hooks=gate_hooks,
    )
    run, backbone = recipe.begin(cfg)
    gates = cfg.make("gates", backbone)
    pairs = run.latents(PreferencePairs, backbone, **cfg.data)
    parts = recipe.Parts(cfg, run, backbone, pairs)
    algorithm = GatedDPO(parts.policy, parts.reference, parts.noising, parts.dims, gates, **cfg.algorithm)
    parts.fit(algorithm, hooks=[GateExport(run, backbone, gates)])


if __name__ == "__main__":
    program.run(main)
