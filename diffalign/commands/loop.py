"""The settings of `diffalign iterate`, and what can be refused before the first round."""

from __future__ import annotations

import runpy
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from diffalign import config
from diffalign.commands import launch
from reward_models.files import read_lines

TRAINERS = ("diffusion_dpo", "inpo", "kto", "mapo", "pso_offline", "rank_dpo", "sft")
"""Recipes that train a generator on preference data, as a whole or as a LoRA."""
OWN = {
    "model": "--pipeline --lora --user-adapter --user --prompts --samples-per-prompt --seed --out",
    "synthesize": "--scorer --judge --select --seed --out",
    "train": "--config --sweep backbone.path backbone.lora backbone.lora_start data.path run.folder run.seed "
    "run.resume",
}
"""Options that the loop gives itself. In the `options` of a section they would change some of its commands only."""


class Loop:
    """The section `loop`. Args: see the example in `diffalign iterate --help`; so for the other sections."""

    def __init__(
        self,
        *,
        folder: str,
        rounds: int = 3,
        reference: Literal["last", "base"] = "last",
        patience: int = 1,
        fresh: str | None = None,
        fresh_share: float = 0.0,
        seed: int = 0,
    ): ...

    @staticmethod
    def check(cfg: Mapping[str, Any]) -> list[str]:
        """Problems, one line each."""
        problems = config.too_small("loop", cfg, rounds=1, patience=1)
        if not 0 <= cfg["fresh_share"] < 1 or (cfg["fresh"] is None) != (cfg["fresh_share"] == 0):
            problems.append("'loop.fresh' and 'loop.fresh_share' in (0, 1) belong together; give both or neither")
        if cfg["fresh"] not in (None, "first") and not cfg["fresh"].endswith(".jsonl"):
            problems.append(f"'loop.fresh' = {cfg['fresh']} must be a .jsonl file or first")
        return problems + _missing("loop.fresh", [] if cfg["fresh"] in (None, "first") else [cfg["fresh"]])


class Model:
    """The section `model`."""

    def __init__(self, *, path: str, options: str = ""): ...

    @staticmethod
    def check(cfg: Mapping[str, Any]) -> list[str]:
        """Problems, one line each."""
        return _own("model", cfg["options"])


class Generate:
    """The section `generate`."""

    def __init__(self, *, prompts: str, samples_per_prompt: int = 4, others: tuple[str, ...] = ()): ...

    @staticmethod
    def check(cfg: Mapping[str, Any]) -> list[str]:
        """Problems, one line each."""
        files = [cfg["prompts"], *(str(Path(folder) / "manifest.jsonl") for folder in cfg["others"])]
        least = 1 if cfg["others"] else 2  # a preference needs two images
        return _missing("generate", files) + config.too_small("generate", cfg, samples_per_prompt=least)


class Synthesize:
    """The section `synthesize`."""

    def __init__(
        self,
        *,
        scorers: tuple[str, ...] = (),
        judges: tuple[str, ...] = (),
        select: Literal["best_worst", "all", "ranked", "winner"] = "best_worst",
        options: str = "",
    ): ...

    @staticmethod
    def check(cfg: Mapping[str, Any]) -> list[str]:
        """Problems, one line each."""
        problems = [] if cfg["scorers"] or cfg["judges"] else ["give 'synthesize.scorers' or 'synthesize.judges'"]
        return problems + _twice("synthesize.scorers", cfg["scorers"]) + _own("synthesize", cfg["options"])


class Train:
    """The section `train`."""

    def __init__(self, *, recipe: str, config: str = "playground", options: str = ""): ...

    @staticmethod
    def check(cfg: Mapping[str, Any]) -> list[str]:
        """Problems, one line each."""
        problems, name, known = _own("train", cfg["options"]), cfg["recipe"], f"known: {', '.join(TRAINERS)}"
        if name not in launch.recipes("train"):
            problems.append(f"no train recipe '{name}'; {known}")
        elif name not in TRAINERS:
            problems.append(f"the recipe '{name}' trains no generator on preference data; {known}")
        return problems


class Evaluate:
    """The section `evaluate`."""

    def __init__(self, *, prompts: str, scorers: tuple[str, ...], samples_per_prompt: int = 2): ...

    @staticmethod
    def check(cfg: Mapping[str, Any], synthesize: Mapping[str, Any]) -> list[str]:
        """Problems, one line each."""
        problems = _missing("evaluate.prompts", [cfg["prompts"]])
        problems += config.too_small("evaluate", cfg, samples_per_prompt=2)
        if not cfg["scorers"] or cfg["scorers"][0] in (*synthesize["scorers"], *synthesize["judges"]):
            problems.append("the first of 'evaluate.scorers' decides when to stop, so it must label nothing; name one")
        return problems + _twice("evaluate.scorers", cfg["scorers"])


SECTIONS: dict[str, Any] = {"loop": Loop, "model": Model, "generate": Generate, "synthesize": Synthesize}
SECTIONS |= {"train": Train, "evaluate": Evaluate}


def _missing(name: str, files: Sequence[str]) -> list[str]:
    return [f"'{name}': '{file}' does not exist" for file in files if not Path(file).exists()]


def _twice(name: str, specs: Sequence[str]) -> list[str]:
    return [f"'{name}' has {spec} twice" for spec in dict.fromkeys(specs) if specs.count(spec) > 1]


def _own(section: str, options: str) -> list[str]:
    """Problems with the options of a section. argparse accepts the beginning of an option as well."""
    try:
        names = [word.partition("=")[0] for word in shlex.split(options)]
    except ValueError as error:
        return [f"'{section}.options' = {options}: {error}"]
    own = OWN[section].split()
    taken = [x for x in names if x in own or (x[:2] == "--" and x[2:] and any(one.startswith(x) for one in own))]
    return [f"'{section}.options': {name} is set by the loop; leave it out" for name in taken]


def check_training(cfg: config.Config) -> None:
    """Resolve the settings of the train recipe. Raises ValueError if they are wrong or do not fit the loop."""
    words = ["--config", cfg.train["config"], *shlex.split(cfg.train["options"])]
    words += ["backbone.path=playground", "data.path=playground", "run.folder=unused"]  # for those of a round
    try:
        runpy.run_path(str(launch.find("train", cfg.train["recipe"])))["main"]([*words, "--sweep", "run.seed=0"])
    except config.SweepRequest as request:  # raised before anything starts
        found = request.resolved([])
    if cfg.loop["reference"] == "base" and not found.backbone["lora_rank"]:
        raise ValueError(
            "'loop.reference' = base needs a LoRA, but the whole network would train: add backbone.lora_rank=16 to "
            "'train.options'"
        )


def read_fresh(file: Path, select: str) -> list[dict[str, Any]]:
    """Lines of a data set to be mixed in. Raises ValueError for a line that is none of `synthesize` with this
    --select, since pairs and ranked groups cannot be read from one file."""
    lines = read_lines(file)
    for number, line in enumerate(lines, 1):
        images = line.get("images") if select == "ranked" else [line.get("chosen"), line.get("rejected")]
        if not isinstance(images, list) or not all(isinstance(one, str) for one in [line.get("prompt"), *images]):
            expected = "prompt, images, ranking" if select == "ranked" else "prompt, chosen, rejected"
            raise ValueError(f"'{file}' line {number} needs {expected}, as 'synthesize.select' = {select} writes them")
    if not lines:
        raise ValueError(f"'{file}' is empty; leave out 'loop.fresh' and 'loop.fresh_share'")
    return lines


def shared_prompts(cfg: config.Config) -> str:
    """A sentence about prompts of evaluation that are trained on too; empty without any. Raises ValueError for files
    that hold no prompts."""
    from diffalign.data.prompts import read_prompts  # loads torch

    trained, held_out = (set(read_prompts(Path(one["prompts"])).values()) for one in (cfg.generate, cfg.evaluate))
    both = len(trained & held_out)
    return f"{both} of {len(held_out)} prompts of evaluation are trained on too: they are not held out." if both else ""
