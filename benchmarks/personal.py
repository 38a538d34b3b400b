"""Personalisation benchmark: scorers and generators for held-out people, given a few choices of each.

    python benchmarks/personal.py                       # everything that results/personal.json lacks
    python benchmarks/personal.py --part ppd --seed 0 --again

A third of the playground's people are held out as strangers: scorers and generators are not trained on their choices.
Scorers are measured on held-out captions against each stranger's noise-free choices, generators on held-out prompts
with each stranger's exact judge, drawn without guidance: how often the stranger would choose the personal image, from
independent noise. Writes benchmarks/results/personal.json, one object per run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import runpy
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from results_file import TEXT, WHOLE, read_rows, write_rows
from safetensors.torch import load_file
from torch import Tensor

from diffalign.commands import launch, program
from diffalign.data import read_records
from diffalign.data.choices import hash_fraction
from diffalign.draws import Draws
from diffalign.networks.user_adapter import adapter_arguments, mix_users, user_embeds
from diffalign.playground import BASE, STUDENTS, Judge
from diffalign.playground.annotators import label, load
from diffalign.playground.people import MATCH, PROTOTYPES, Person
from diffalign.playground.ratings import write_pairs
from diffalign.playground.world import captions
from diffalign.report.preference_rate import preferred
from diffalign.training.hooks.strangers import calibration_error
from reward_models import load_scorer
from reward_models.accuracy import interval
from reward_models.personal.scorers import save_user
from reward_models.personal.tastes import Taste

RESULTS = Path(__file__).parent / "results" / "personal.json"
PEOPLE = [f"person-{k}" for k in range(180)]
STRANGERS = [name for name in PEOPLE if hash_fraction(name) < 0.33]  # as configs/personal_reward/playground.yaml
SHOTS = (0, 2, 4, 10, 20, 50)
SAMPLES = 2
"""Images of each prompt, so that people can choose between images from independent noise."""
HEADS = {
    "pal": (),
    "pal B": ("scorer.variant=B",),
    "vpl": ("scorer.head=vpl", "scorer.size=4", "algorithm.beta_kl=0.03"),
    "groups": ("scorer.head=groups", "scorer.size=3"),
    "logistic": ("scorer.head=logistic",),
    "one for all": ("scorer.head=groups", "scorer.size=1"),
}
"""`one for all` is the single Bradley-Terry scorer, without user vectors."""


class Choices(NamedTuple):
    """Rendered pairs of held-out captions: images, and features z [n, Z] of both images."""

    prompts: list[str]
    images: tuple[Tensor, Tensor]
    z: tuple[Tensor, Tensor]


class Town:
    """People, their choices, and the images shown to them; created once."""

    def __init__(self, folder: Path):
        self.folder, self.seconds = folder, {}
        folder.mkdir(parents=True, exist_ok=True)
        self.choices = folder / "people" / "choices.jsonl"
        if not self.choices.exists():
            write_pairs(folder / "people", 3600)
            label(folder / "people", self.choices, annotators=PEOPLE, opinions=5, min_margin=0)
            write_pairs(folder / "new", 600, held_out=True)

    def scorer(self, head: str, seed: int) -> Any:
        """A personal scorer trained on all people but the strangers."""
        run = self.folder / f"{head.replace(' ', '-')}-{seed}"
        if not (run / "export" / "reward_config.json").exists():
            settings = [f"data.path={self.choices}", f"run.folder={run}", f"run.seed={seed}", f"scorer.seed={seed}"]
            settings += ["hooks.checkpoint_every=0", "hooks.validate_every=1000000", "hooks.shots=[4]", *HEADS[head]]
            started = time.time()
            runpy.run_path(str(launch.find("train", "personal_reward")))["main"](["--config=playground", *settings])
            self.seconds[head, seed] = round(time.time() - started, 1)
        return load_scorer(str(run / "export"), "cpu")

    def known(
        self, scorer: Any, folder: Path | None = None, people: Sequence[str] = STRANGERS
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """z [n, Z] of chosen and rejected images of every stranger, or of given people of another folder."""
        found, folder = {}, folder or self.folder / "people"
        records: dict[str, list[Any]] = {}
        for record in read_records(folder / "choices.jsonl"):
            if record.annotator in people:  # type: ignore[union-attr]
                records.setdefault(record.annotator, []).append(record)  # type: ignore[union-attr, arg-type]
        rows, images = load(folder)
        place = {row["image"]: k for k, row in enumerate(rows)}
        z = features(scorer, images, [row["prompt"] for row in rows])
        for name, own in records.items():
            numbers = [[place["images/" + Path(x.images[k].path).name] for x in own] for k in (0, 1)]
            found[name] = (z[numbers[0]], z[numbers[1]])
        return found

    def new(self, scorer: Any) -> Choices:
        """Pairs of held-out captions."""
        rows, images = load(self.folder / "new")
        prompts = [row["prompt"] for row in rows]
        z = features(scorer, images, prompts)
        return Choices(prompts[::2], (images[::2], images[1::2]), (z[::2], z[1::2]))


@torch.no_grad()
def features(scorer: Any, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """z [N, Z] of images [N, 3, 32, 32]."""
    parts = [
        scorer.encode(scorer.preprocess(images[k : k + 256]), prompts[k : k + 256]) for k in range(0, len(images), 256)
    ]
    return torch.cat(parts)


def score_strangers(town: Town, head: str, seed: int) -> list[dict[str, Any]]:
    """Rows, one per number of choices."""
    scorer = town.scorer(head, seed)
    known, new = town.known(scorer), town.new(scorer)
    margins = {
        n: Person(name=n).score(new.images[0], new.prompts) - Person(name=n).score(new.images[1], new.prompts)
        for n in known
    }
    rows = []
    for shots in SHOTS:
        right, chances, doubts = [], [], []
        for name, (z_w, z_l) in known.items():
            # The first choices; z_w and z_l are in the order of the data set, which is random.
            taste = scorer.head.fit(z_w[:shots], z_l[:shots]) if shots else None
            with torch.no_grad():
                who = scorer.head.anybody() if taste is None else taste.mean
                margin = scorer.head.margin(*new.z, who)
                right.append(((margin > 0) == (margins[name] > 0)).float().mean().item())
                if taste is not None:
                    chance, doubt = scorer.head.chance(z_w[50:], z_l[50:], taste)
                    chances.append(chance)
                    doubts.append(doubt.mean().item())
        low, high = interval(right)
        row = {"part": "scorer", "case": head, "seed": seed, "shots": shots, "n": len(right)}
        row |= {"accuracy": round(float(np.mean(right)), 4), "low": round(low, 4), "high": round(high, 4)}
        if chances:
            row |= {"calibration_error": round(calibration_error(torch.cat(chances)), 4)}
            row |= {"doubt": round(float(np.mean(doubts)), 4)}
        if head in ("pal", "groups") and not shots:
            row["prototypes"] = prototypes(scorer, new)
        rows.append(row)
    rows[0]["seconds"] = town.seconds.get((head, seed))
    return rows


def prototypes(scorer: Any, new: Choices) -> list[list[float]]:
    """Agreement of choices of learned prototypes or groups (rows) with the true ones (columns), in the best order."""
    table = []
    for k in range(len(PROTOTYPES)):
        vector = torch.full((len(PROTOTYPES),), -50.0)
        vector[k] = 0
        with torch.no_grad():
            ours = scorer.head.margin(*new.z, vector) > 0
        table.append([])
        for name in PROTOTYPES:
            judge = Person(name=name)
            theirs = judge.score(new.images[0], new.prompts) > judge.score(new.images[1], new.prompts)
            table[-1].append(round((ours == theirs).float().mean().item(), 3))
    return max(
        ([table[k] for k in order] for order in itertools.permutations(range(3))),
        key=lambda t: sum(t[k][k] for k in range(3)),
    )


class Gallery:
    """Images of the base model and of personalised ones, SAMPLES of each prompt one after another, from fixed noise."""

    def __init__(self, adapter: Path | None = None, *, path: Path = BASE, lora: Path | None = None):
        self.pipe: Any = StableDiffusionPipeline.from_pretrained(path, safety_checker=None, torch_dtype=torch.float32)
        if lora is not None:
            self.pipe.load_lora_weights(str(lora), weight_name="pytorch_lora_weights.safetensors")
        self.pipe.set_progress_bar_config(disable=True)
        if adapter is not None:
            self.pipe.load_ip_adapter(**adapter_arguments(adapter))

    def draw(self, prompts: Sequence[str], first: int = 0, user: Tensor | None = None, steps: int = 10) -> Tensor:
        """Images [SAMPLES n, 3, 32, 32]; first is the index of the first prompt, user [1, T, D]."""
        keys = [(first + k, sample) for k in range(len(prompts)) for sample in range(SAMPLES)]
        conditioning = {} if user is None else {"ip_adapter_image_embeds": user_embeds(user, guidance=1.0)}
        latents = Draws(0).normal(keys, (4, 16, 16), stream="latents")
        settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "pt"}
        return self.pipe(twice(prompts), latents=latents, **settings, **conditioning).images.float()


def twice(prompts: Sequence[str]) -> list[str]:
    """Every prompt as often as it is drawn."""
    return [prompt for prompt in prompts for _ in range(SAMPLES)]


def chosen(before: Tensor, after: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
    """How often the person with these scores would choose the second images, for each prompt."""
    return preferred(before.numpy(), after.numpy(), prompts, choice_temperature=Judge.choice_temperature)


def estimate(values: NDArray[np.float64]) -> list[float]:
    """Mean and interval over prompts."""
    return [round(x, 4) for x in (float(values.mean()), *interval(values))]


def personalise(town: Town, seed: int, choices: int = 4) -> dict[str, Any]:
    """Row of PPD: own user vector against the base and another user's, no user, prompt match, mixtures."""
    town.scorer("pal", seed)
    encoder = town.folder / f"pal-{seed}" / "export"
    pairs, users, run = (
        town.folder / "pairs.jsonl",
        town.folder / f"users-{seed}.safetensors",
        town.folder / f"ppd-{seed}",
    )
    if not pairs.exists():
        prompts = town.folder / "prompts.jsonl"
        lines = [json.dumps({"prompt": p, "prompt_id": str(i)}) for i, p in enumerate(captions(768, held_out=False))]
        prompts.write_text("\n".join(lines) + "\n")
        generate = ["--pipeline=playground", f"--prompts={prompts}", f"--out={town.folder / 'images'}", "--seed=1"]
        generate += ["--samples-per-prompt=2", "--size=32", "--batch-size=64", "--steps=10", "--guidance=1"]
        assert runpy.run_path(str(launch.find("tools", "generate")))["main"](generate) == 0
        seen = [name for name in PEOPLE if name not in STRANGERS]
        label(town.folder / "images", pairs, annotators=seen, opinions=8)
    embed = ["embed", str(town.choices), f"--encoder={encoder}", f"--choices={choices}", f"--out={users}"]
    assert runpy.run_path(str(launch.find("tools", "user")))["main"](embed) == 0
    shared = [f"data.path={pairs}", f"run.seed={seed}", "hooks.checkpoint_every=0", "hooks.verify_export=false"]
    personal = [f"users.path={users}", f"run.folder={run}", f"adapter.seed={seed}"]
    started = time.process_time()
    runpy.run_path(str(launch.find("train", "ppd")))["main"](["--config=playground", *shared, *personal])
    seconds = time.process_time() - started
    for_all = [f"run.folder={run}-for-all", f"backbone.seed={seed}", "data.limit=null", "hooks.sample_every=0"]
    runpy.run_path(str(launch.find("train", "diffusion_dpo")))["main"](["--config=playground", *shared, *for_all])
    tables = load_file(users)
    tokens = {name: tables[name][:1] for name in STRANGERS}  # one random set of `choices` choices: [1, T, D]
    return {
        "part": "ppd",
        "case": f"{choices} choices",
        "seed": seed,
        **judge(run / "export", Path(f"{run}-for-all", "export"), tokens),
        "seconds": round(seconds, 1),
    }


def judge(adapter: Path, for_all: Path, tokens: dict[str, Tensor], each: int = 4) -> dict[str, Any]:
    """`each` held-out prompts per stranger, who chooses; `for_all` was trained on the same pairs, for nobody."""
    names = sorted(tokens)
    prompts = captions(each * len(names), held_out=True)
    pipe = Gallery(adapter)
    other = {name: names[(k + len(names) // 2) % len(names)] for k, name in enumerate(names)}

    def images(user: Mapping[str, str]) -> Tensor:
        some = [(prompts[k * each : (k + 1) * each], k * each, tokens[user[name]]) for k, name in enumerate(names)]
        return torch.cat([pipe.draw(*each_user) for each_user in some])

    drawn = {
        "base": Gallery().draw(prompts),
        "one for all": Gallery(lora=for_all).draw(prompts),
        "own": images({name: name for name in names}),
        "other": images(other),
        "nobody": pipe.draw(prompts, user=torch.zeros_like(tokens[names[0]])),
    }
    texts, of_one = twice(prompts), SAMPLES * each
    parts = [(Person(name=name), slice(k * of_one, (k + 1) * of_one)) for k, name in enumerate(names)]
    scores = {
        key: torch.cat([person.score(x[some], texts[some]) for person, some in parts]) for key, x in drawn.items()
    }
    row: dict[str, Any] = {"n": len(prompts)}
    ids = [str(k // SAMPLES) for k in range(len(texts))]  # a caption may come twice, for two strangers
    for mine, against in (
        *(("own", x) for x in ("base", "other", "one for all")),
        *((x, "base") for x in ("one for all", "nobody")),
    ):
        gain = (scores[mine] - scores[against]).mean() / scores["base"].std()
        row[f"{mine} vs {against}"] = [*estimate(chosen(scores[against], scores[mine], ids)), round(gain.item(), 4)]
    for key in ("base", "own", "one for all"):
        measured = Judge().measure(drawn[key], texts)
        row[f"match of {key}"] = round(torch.stack([measured[x] for x in MATCH]).mean().item(), 4)
    row["mixture"] = mixture(pipe, tokens)
    return row


def mixture(pipe: Gallery, tokens: dict[str, Tensor], pairs: int = 6, each: int = 16) -> list[list[float]]:
    """Mean scores of two strangers with distant ideals for mixtures of their user vectors.

    Rows are [share of the first, score of the first, score of the second]."""
    names = sorted(tokens)
    ideals = {name: Person(name=name).ideal for name in names}
    far = sorted(itertools.combinations(names, 2), key=lambda ab: -(ideals[ab[0]] - ideals[ab[1]]).norm())[:pairs]
    prompts = captions(each, held_out=True)
    curve = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        found = []
        for a, b in far:
            images = pipe.draw(prompts, 0, mix_users([tokens[a], tokens[b]], [share, 1 - share]))
            found.append([Person(name=x).score(images, twice(prompts)).mean().item() for x in (a, b)])
        curve.append([share, *(round(x, 3) for x in np.mean(found, axis=0).tolist())])
    return curve


RATIOS = {"1:1": 30, "3:1": 45, "9:1": 54}
"""Of 60 people, how many like it bright; the others have the opposite preference."""


def in_conflict(town: Town, seed: int, ratio: str) -> list[dict[str, Any]]:
    """A one-step student trained on one scorer for all, or with MaxMin on two EM groups: how each group likes it."""
    folder, many = town.folder / f"conflict-{ratio.replace(':', '-')}", RATIOS[ratio]
    people = [f"bright-{k}" for k in range(many)] + [f"faded-{k}" for k in range(60 - many)]
    if not (folder / "choices.jsonl").exists():
        write_pairs(folder, 1200)
        label(folder, folder / "choices.jsonl", annotators=people, opinions=5, min_margin=0)
    specs, right = group_scorers(town, folder, people, seed)
    rewards = {
        "one for all": [f"reward.scorers=['{specs[0]}']"],
        "MaxMin": [f"reward.scorers={specs[1:]}", "reward.normalise=start", "reward.maxmin=2"],
    }
    prompts = captions(128, held_out=True)
    ids = [str(k // SAMPLES) for k in range(SAMPLES * len(prompts))]
    base, rows, likes = Gallery(path=STUDENTS[1]).draw(prompts, steps=1), [], {}
    for name, reward in rewards.items():
        run = folder / f"{name.replace(' ', '-')}-{seed}"
        settings = [f"run.folder={run}", f"run.seed={seed}", "backbone.path=playground_one_step", "sampler.steps=1"]
        settings += [
            f"backbone.seed={seed}",
            "hooks.checkpoint_every=0",
            "hooks.sample_every=0",
            "monitor.prompts=null",
        ]
        started = time.process_time()
        runpy.run_path(str(launch.find("train", "r0")))["main"](["--config=playground", *settings, *reward])
        row: dict[str, Any] = {
            "part": "maxmin",
            "case": f"{name}, {ratio}",
            "seed": seed,
            "told apart": round(right, 3),
        }
        images = Gallery(path=STUDENTS[1], lora=run / "export").draw(prompts, steps=1)
        for group in ("bright", "faded"):
            theirs, ours = (Person(name=group).score(x, twice(prompts)) for x in (base, images))
            likes[name, group] = chosen(theirs, ours, ids)
            row[group] = estimate(likes[name, group])
        rows.append(row | {"seconds": round(time.process_time() - started, 1)})
    worst = min(("bright", "faded"), key=lambda group: rows[0][group][0])
    rows[1]["lift of the worst group"] = estimate(likes["MaxMin", worst] - likes["one for all", worst])
    return rows


def group_scorers(town: Town, folder: Path, people: Sequence[str], seed: int) -> tuple[list[str], float]:
    """The scorer for all and those of two EM groups, and the share of the people who are in the right group."""
    specs = []
    for groups in (1, 2):
        run = folder / f"groups-{groups}-{seed}"
        settings = [f"data.path={folder / 'choices.jsonl'}", f"run.folder={run}", f"run.seed={seed}"]
        settings += [f"scorer.seed={seed}", "scorer.head=groups", f"scorer.size={groups}", "trainer.steps=400"]
        settings += ["hooks.checkpoint_every=0", "hooks.validate_every=1000000", "hooks.shots=[4]"]
        runpy.run_path(str(launch.find("train", "personal_reward")))["main"](["--config=playground", *settings])
        specs.append(str(run / "export"))
    both = specs.pop()
    scorer: Any = load_scorer(both, "cpu")
    known = town.known(scorer, folder, people)
    belongs = {name: scorer.head.fit(*(z[:20] for z in own)).mean.argmax().item() for name, own in known.items()}
    alike = sum((belongs[name] == belongs["faded-0"]) == name.startswith("faded") for name in belongs)
    for k in range(2):
        user = folder / f"group-{k}-{seed}.safetensors"
        vector = (torch.nn.functional.one_hot(torch.tensor(k), 2).float() - 1) * 50
        save_user(user, vector[None], Taste(vector, vector[None]), made_by=scorer.fingerprint)
        specs.append(f"{both},user={user}")
    return specs, alike / len(belongs)


PARTS: dict[tuple[str, str], Any] = {
    **{("scorer", head): lambda town, seed, head=head: score_strangers(town, head, seed) for head in HEADS},
    ("ppd", "4 choices"): lambda town, seed: [personalise(town, seed)],
    **{
        ("maxmin", f"MaxMin, {ratio}"): lambda town, seed, ratio=ratio: in_conflict(town, seed, ratio)
        for ratio in RATIOS
    },
}
"""(part, case) -> (town, seed) -> rows"""


def run_of(row: dict[str, Any]) -> tuple[str, str, int]:
    """The run that a row is of."""
    return row["part"], row["case"], row["seed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", choices=dict.fromkeys(part for part, _ in PARTS), action="append", help="default: all"
    )
    parser.add_argument("--seed", type=int, action="append", help="default: 0, 1, 2")
    parser.add_argument("--again", action="store_true", help="also what the results have already")
    parser.add_argument("--work", type=Path, help="folder of images and runs, which is kept; default: a temporary one")
    args = parser.parse_args()
    rows = read_rows(RESULTS, {"part": TEXT, "case": TEXT, "seed": WHOLE})
    done = set() if args.again else set(map(run_of, rows))
    with tempfile.TemporaryDirectory() as folder:
        town = Town((args.work or Path(folder)).absolute())
        for seed, (part, case) in itertools.product(args.seed or (0, 1, 2), PARTS):
            if (part, case, seed) in done or part not in (args.part or (part,)):
                continue
            found = PARTS[part, case](town, seed)
            print(*map(json.dumps, found), sep="\n", flush=True)
            rows = [r for r in rows if run_of(r) not in set(map(run_of, found))] + found
            write_rows(RESULTS, rows)


if __name__ == "__main__":
    program.run(main)
