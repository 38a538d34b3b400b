"""Alignment benchmark: every algorithm, its controls and three seeds, scored by the exact judge on held-out prompts.

    python benchmarks/learning.py                                  # everything that results/learning.json lacks
    python benchmarks/learning.py --case inpo/lora --seed 0 --labels flipped

Per case and seed: the same pairs of the base model's own samples, labelled by simulated annotators truly, with every
label flipped, at random, or with three labels of ten swapped; train by the recipe; generate from held-out prompts; win
rate of the judge's score against the base model's images of the same prompts, from equal noise and from other noise.
True labels must win (lower bound over one half), flipped ones must lose, random ones must do neither. Writes
benchmarks/results/learning.json, one object a run, and the tables of docs/learning.md.
"""

from __future__ import annotations

import argparse
import json
import runpy
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from results_file import commit, read_rows, write_rows

from diffalign.commands import launch
from diffalign.networks.loading import Denoiser
from diffalign.playground import Judge
from diffalign.playground.annotators import label, load, rank
from diffalign.playground.world import captions
from diffalign.report import paired_win_rate
from reward_models.files import write_whole

RESULTS = Path(__file__).parent / "results" / "learning.json"
PAGE = Path(__file__).parent.parent / "docs" / "learning.md"
MARK = "<!-- what follows is written by benchmarks/learning.py -->"
STEPS = {"playground_one_step": 1, "playground_four_step": 4}  # the others draw in 10 with guidance 2
BOTH, ALL = ("true", "flipped"), ("true", "flipped", "random")
NOISY = "noisy"  # true labels, of which SWAPPED were swapped
SWAPPED = 0.3


class Case(NamedTuple):
    """A recipe, changes to its playground config, its kinds of labels, and the model.

    With `scored`, it trains on prompts with a learned scorer or the judge; flipped labels mean the weight -1.
    """

    recipe: str
    changes: tuple[str, ...] = ()
    labels: tuple[str, ...] = BOTH
    model: str = "playground"
    scored: bool = False


ONE, FOUR = STEPS
FLOW = ("backbone.path=playground_flow", "backbone.max_sequence_length=8")
SMPO = ("algorithm.smoothing=10", "algorithm.score_range=10", "inversion.renoise=1", "trainer.steps=80")
CONSERVATIVE = ("algorithm.loss=conservative", "algorithm.label_smoothing=0.3")
ROBUST = ("algorithm.loss=robust", "algorithm.label_smoothing=0.3")
LONG = ("trainer.steps=600", "optimizer.lr=1e-3")  # long enough to overfit to wrong labels
CASES = {
    "diffusion_dpo/lora": Case("diffusion_dpo", (), (*ALL, NOISY)),
    "diffusion_dpo/full": Case("diffusion_dpo", ("backbone.lora_rank=0", "optimizer.lr=3e-5"), ALL),
    "inpo/lora": Case("inpo"),
    "smpo/lora": Case("inpo", SMPO),
    "rank_dpo/lora": Case("rank_dpo"),
    "kto/lora": Case("kto"),
    "mapo/lora": Case("mapo"),
    "sft/lora": Case("sft", (), ("true",)),
    "diffusion_dpo/flow": Case("diffusion_dpo", FLOW, model="playground_flow"),
    "inpo/flow": Case("inpo", FLOW, model="playground_flow"),
    "conservative/lora": Case("diffusion_dpo", CONSERVATIVE, (NOISY,)),
    "robust/lora": Case("diffusion_dpo", ROBUST, (NOISY,)),
    "diffusion_dpo long/lora": Case("diffusion_dpo", LONG, (NOISY,)),
    "conservative long/lora": Case("diffusion_dpo", (*CONSERVATIVE, *LONG), (NOISY,)),
    "robust long/lora": Case("diffusion_dpo", (*ROBUST, *LONG), (NOISY,)),
    "refl/lora": Case("refl", scored=True),
    "draft/lora": Case("draft", scored=True),
    "pso/four_step": Case("pso", model=FOUR, scored=True),
    "pso judge/four_step": Case("pso", ("reward.scorers=[diffalign.playground:Judge]",), model=FOUR, scored=True),
    "pso_offline/four_step": Case("pso_offline", model=FOUR),
    "naive/one_step": Case("sft", (f"backbone.path={ONE}",), ("true",), model=ONE),
    "naive/four_step": Case("sft", (f"backbone.path={FOUR}",), ("true",), model=FOUR),
    "diff_instruct_star/one_step": Case("diff_instruct_star", model=ONE, scored=True),
    "diff_instruct_star/four_step": Case(
        "diff_instruct_star", (f"backbone.path={FOUR}", "sampler.steps=4"), model=FOUR, scored=True
    ),
    "r0 plus/one_step": Case("r0", (f"backbone.path={ONE}", "sampler.steps=1"), model=ONE, scored=True),
    "r0 plus/four_step": Case("r0", model=FOUR, scored=True),
    "r0/four_step": Case("r0", ("algorithm.rewarded=final", "trainer.steps=50"), model=FOUR, scored=True),
}


class World:
    """Samples of a base model on training prompts (for labels) and on held-out prompts (the baseline), created once."""

    def __init__(self, folder: Path, model: str = "playground"):
        self.folder, self.model = folder, model
        folder.mkdir(parents=True, exist_ok=True)
        self._prompts("train", 768, held_out=False)
        self._prompts("ranked", 384, held_out=False)
        self._prompts("held_out", 128, held_out=True)
        self.generate("held_out", "base")
        self.generate("held_out", "base-other-noise", "--seed=1")

    def _prompts(self, name: str, n: int, *, held_out: bool) -> None:
        lines = [json.dumps({"prompt": p, "prompt_id": str(i)}) for i, p in enumerate(captions(n, held_out=held_out))]
        (self.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def generate(self, prompts: str, out: str, *more: str, samples: int = 2) -> None:
        arguments = [
            f"--pipeline={self.model}",
            f"--prompts={self.folder / prompts}.jsonl",
            f"--out={self.folder / out}",
        ]
        recipe = runpy.run_path(str(launch.find("tools", "generate")))
        steps = STEPS.get(self.model)
        sampling = ["--size=32", "--batch-size=64", f"--steps={steps or 10}", f"--guidance={1.0 if steps else 2.0}"]
        sampling += ["--max-sequence-length=8"] if self.model == "playground_flow" else []
        if recipe["main"]([*arguments, f"--samples-per-prompt={samples}", *sampling, *more]):
            raise RuntimeError(f"generating '{out}' failed")

    def labelled(self, name: str, case: Case, labels: str, seed: int) -> Path:
        """The data set of a run: pairs, or for RankDPO groups of four out of as many images."""
        out, kind = self.folder / f"{name}.jsonl", "true" if labels == NOISY else labels
        if case.recipe == "rank_dpo":
            self.generate("ranked", "groups", "--seed=1", samples=4)
            rank(self.folder / "groups", out, labels=kind, seed=seed)  # type: ignore[arg-type]
        else:
            self.generate("train", "pairs", "--seed=1")
            noise = SWAPPED if labels == NOISY else 0.0
            label(self.folder / "pairs", out, labels=kind, noise=noise, seed=seed)  # type: ignore[arg-type]
        return out

    def win_rate(self, aligned: str, base: str = "base") -> Any:
        """The judge's win rate of one folder of held-out images over another of the same prompts."""
        rows, theirs = load(self.folder / base)
        prompts = [row["prompt"] for row in rows]
        scores = [Judge().score(images, prompts).numpy() for images in (theirs, load(self.folder / aligned)[1])]
        return paired_win_rate(*scores, [row["prompt_id"] for row in rows])


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Counts images in forward passes of a denoiser, including the reference and inversions."""
    count = {"forwards": 0}

    def hook(module: Any, arguments: Any, out: Any) -> None:
        if isinstance(module, Denoiser):
            count["forwards"] += len(arguments[0])

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def learn(world: World, case: str, labels: str, seed: int) -> dict[str, Any]:
    """Label, train, generate and evaluate: one row of the table."""
    chosen = CASES[case]
    name = f"{case.replace('/', '-')}-{labels}-{seed}"
    run = world.folder / name
    settings = [f"run.folder={run}", f"run.seed={seed}", "hooks.sample_every=0"]
    if chosen.scored:
        settings += ["monitor.every=30", f"reward.weights=[{1 if labels == 'true' else -1}]"]
    else:
        settings += [f"data.path={world.labelled(name, chosen, labels, seed)}"]
    settings += [f"backbone.seed={seed}", "hooks.checkpoint_every=0", "hooks.verify_export=false", *chosen.changes]
    started = time.time()
    with counting() as count:
        runpy.run_path(str(launch.find("train", chosen.recipe)))["main"](["--config=playground", *settings])
    seconds = time.time() - started
    export = run / "export"
    full = (export / "model_index.json").exists()
    world.generate("held_out", f"{name}-images", *([f"--pipeline={export}"] if full else [f"--lora={export}"]))
    rate, other = (world.win_rate(f"{name}-images", base) for base in ("base", "base-other-noise"))
    return {
        "algorithm": case,
        "backbone": chosen.model,
        "labels": labels,
        "seed": seed,
        "n": rate.n,
        "win_rate": round(rate.win_rate, 4),
        "low": round(rate.low, 4),
        "high": round(rate.high, 4),
        "points": round(rate.mean_difference, 4),
        "other_noise": [round(x, 4) for x in (other.win_rate, other.low, other.high)],
        "seconds": round(seconds, 1),
        "forwards": count["forwards"],
        "commit": commit(),
        **({"warnings": warnings(run)} if chosen.scored else {}),
    }


def warnings(run: Path) -> int:
    """Number of warnings of the monitor."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return int(sum(row.get("monitor/warnings", 0) for row in rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Table of the docs: one line per case and kind of labels, with the seeds side by side."""
    share = "direction of the shift (equal), share won (other) [95 % interval] of each seed"
    names = ("algorithm", "labels", "noise", share, "points", "seconds", "forwards")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for case, labels in dict.fromkeys((r["algorithm"], r["labels"]) for r in rows):
        mine = sorted((r for r in rows if (r["algorithm"], r["labels"]) == (case, labels)), key=lambda r: r["seed"])
        points = ", ".join(f"{r['points']:+.3f}" for r in mine)
        seconds = sum(r["seconds"] for r in mine) / len(mine)
        counted = [r["forwards"] for r in mine if "forwards" in r]
        forwards = f"{counted[0]:,}" if counted else ""
        for noise in ("equal", "other"):
            three = [r["other_noise"] if noise == "other" else (r["win_rate"], r["low"], r["high"]) for r in mine]
            rates = ", ".join(f"{rate:.3f} [{low:.3f}, {high:.3f}]" for rate, low, high in three)
            lines.append(f"| {case} | {labels} | {noise} | {rates} | {points} | {seconds:.0f} | {forwards} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--labels", choices=(*ALL, NOISY), action="append", help="default: all")
    parser.add_argument("--seed", type=int, action="append", help="default: 0, 1, 2")
    args = parser.parse_args()
    rows = read_rows(RESULTS)
    done = {(r["algorithm"], r["labels"], r["seed"]) for r in rows}
    with tempfile.TemporaryDirectory() as folder:
        worlds = {m: World(Path(folder, m), m) for m in dict.fromkeys(CASES[c].model for c in args.case or CASES)}
        for seed in args.seed or (0, 1, 2):
            for case in args.case or CASES:
                for labels in CASES[case].labels:
                    if (case, labels, seed) in done or labels not in (args.labels or CASES[case].labels):
                        continue
                    rows.append(learn(worlds[CASES[case].model], case, labels, seed))
                    print(json.dumps(rows[-1]), flush=True)
                    write_rows(RESULTS, rows)
    before = PAGE.read_text().split(MARK)[0]
    write_whole(PAGE, before + MARK + "\n\n" + table(rows))


if __name__ == "__main__":
    main()
