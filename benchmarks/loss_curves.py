"""Loss curves of Diffusion-DPO on the playground: optimizers and stored precisions beside AdamW with float32 weights.

    python benchmarks/loss_curves.py            # writes benchmarks/results/loss_curves.json

All runs see the same pairs, noise and timesteps, so their losses are compared step by step: `gap` is the mean absolute
difference from the baseline, `end` the mean loss of the last 20 steps, `baseline_end` that of the baseline. "norms in
float32" converts the input of each norm to float32 and gives float32 on, as CUDA's autocast does. A run must keep its
tolerance on both (`gap` is left out for other algorithms than AdamW and for another base model; Prodigy, whose estimate
needs more steps than these, has none).
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState
from results_file import RESULTS, ROOT, commit, cpu, write_rows
from torch import Tensor, nn

from diffalign.networks import placement
from diffalign.networks.placement import HALF_NORMS

FILE = RESULTS / "loss_curves.json"
STEPS = 80
LAST = 20
COMMON = [
    "data.limit=800",
    "data.batch_size=8",
    f"trainer.steps={STEPS}",
    f"optimizer.lr_cosine_steps={STEPS}",
    "run.log_every=1",
]
COMMON += ["hooks.sample_every=0", "hooks.checkpoint_every=0", "hooks.verify_export=false"]
LORA, FULL = ["backbone.lora_rank=8"], ["backbone.lora_rank=0", "optimizer.lr=1e-4"]
HALF = ["run.mixed_precision=bf16"]


class Case(NamedTuple):
    """settings    of the run
    norms       classes of norms in half precision; None: those of diffalign
    gap         largest mean difference from the baseline's losses; None: not compared
    end         largest difference of the mean loss of the last steps from the baseline's; None: not compared
    """

    settings: list[str]
    gap: float | None = None
    end: float | None = 0.0
    norms: dict[type[nn.Module], type[nn.Module]] | None = None


class FloatGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class FloatLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


FLOAT_NORMS: dict[type[nn.Module], type[nn.Module]] = {nn.GroupNorm: FloatGroupNorm, nn.LayerNorm: FloatLayerNorm}


CASES = {
    "LoRA": {
        "adamw": Case(LORA),
        "adamw_8bit": Case([*LORA, "optimizer.kind=adamw_8bit"], 0.01, 0.01),
        "adafactor": Case([*LORA, "optimizer.kind=adafactor"], None, 0.05),
        "prodigy": Case([*LORA, "optimizer.kind=prodigy", "optimizer.lr=1"], None, None),
        "base in int8": Case([*LORA, "backbone.quantize=int8"], 0.01, 0.01),
        "base in nf4": Case([*LORA, "backbone.quantize=nf4"], None, 0.05),
    },
    "full": {
        "adamw": Case(FULL),
        "adamw_8bit": Case([*FULL, "optimizer.kind=adamw_8bit"], 0.01, 0.01),
        "adafactor": Case([*FULL, "optimizer.kind=adafactor"], None, 0.05),
        "prodigy": Case([*FULL, "optimizer.kind=prodigy", "optimizer.lr=1"], None, None),
    },
    "full, bf16 autocast": {
        "adamw": Case([*FULL, *HALF]),
        "adamw_8bit": Case([*FULL, *HALF, "optimizer.kind=adamw_8bit"], 0.01, 0.01),
        "adamw_8bit, weights in bf16": Case(
            [*FULL, *HALF, "optimizer.kind=adamw_8bit", "backbone.trained_dtype=bf16"], 0.01, 0.01
        ),
        "norms in float32": Case([*FULL, *HALF], 0.01, 0.01, FLOAT_NORMS),
        "float32": Case(FULL, 0.01, 0.01),
    },
    "LoRA, bf16 autocast": {
        "adamw": Case([*LORA, *HALF]),
        "norms in float32": Case([*LORA, *HALF], 0.01, 0.01, FLOAT_NORMS),
        "float32": Case(LORA, 0.01, 0.01),
    },
}


def losses(case: Case) -> list[float]:
    """Losses of one run by step."""
    placement.HALF_NORMS = case.norms or HALF_NORMS
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one precision a process
    main = runpy.run_path(str(ROOT / "train" / "diffusion_dpo.py"))["main"]
    with tempfile.TemporaryDirectory() as folder:
        main(["--config=playground", *COMMON, *case.settings, f"run.folder={folder}/run"])
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return [row["policy/loss"] for row in map(json.loads, lines) if "policy/loss" in row]


def compared(found: list[float], baseline: list[float], case: Case) -> dict[str, Any]:
    gap = mean(abs(a - b) for a, b in zip(found, baseline, strict=True))
    end, expected = mean(found[-LAST:]), mean(baseline[-LAST:])
    kept = all(most is None or x <= most for x, most in ((abs(end - expected), case.end), (gap, case.gap)))
    row = {"first": found[0], "end": end, "baseline_end": expected, "end_tolerance": case.end}
    return row | {"gap": gap, "gap_tolerance": case.gap, "kept": kept}


def main() -> None:
    torch.set_num_threads(1)
    where = {"cpu": cpu(), "torch": torch.__version__, "commit": commit(), "steps": STEPS}
    rows: list[dict[str, Any]] = []
    for trained, cases in CASES.items():
        baseline: list[float] = []
        for name, case in cases.items():
            found = losses(case)
            baseline = baseline or found
            rows.append({"trained": trained, "case": name} | compared(found, baseline, case) | where)
            print(rows[-1], file=sys.stderr)
            write_rows(FILE, rows)
    if broken := [f"{row['trained']}: {row['case']}" for row in rows if not row["kept"]]:
        raise SystemExit(f"beyond the tolerance: {', '.join(broken)}")


if __name__ == "__main__":
    main()
