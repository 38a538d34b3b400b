"""Tests that also run with the oldest versions of setup.cfg, which `.ci/run` installs."""

from __future__ import annotations

import ast
import configparser
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from packaging.version import Version
from safetensors.torch import load_file, save_file
from stock import shared
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoTokenizer, CLIPTokenizer, CLIPTokenizerFast, T5TokenizerFast

from diffalign.networks.export import export
from diffalign.networks.loading import load_backbone
from diffalign.playground import BASE, FLOW, SHIPPED, STUDENTS, Judge
from diffalign.playground.world import captions

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
IMPORTED_AS = {"open_clip_torch": "open_clip", "pillow": "PIL", "pyyaml": "yaml"}
ODD = ["", "xylophone Zebra!", "a café's naïve  dog, 42", "RED circle\ton white", "foo & bar é ü 漢字 it's"]
FILES = [pytest.param(folder, id=name) for name, folder in SHIPPED.items()]


def extras() -> dict[str, str]:
    """Requirement lists of setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return dict(config["options.extras_require"])


def floors(section: str, option: str) -> dict[str, str]:
    """Names and oldest versions of the requirements of a list in setup.cfg, "" without a version."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    pairs = (line.partition(" >= ") for line in config[section][option].splitlines() if line)
    return {name: floor for name, _, floor in pairs}


REQUIRED = floors("options", "install_requires")
OPTIONAL = "".join(f"\n{names}" for name, names in extras().items() if name != "test")


def test_what_is_required_is_what_is_imported() -> None:
    imported = set()
    for folder in ("diffalign", "reward_models", "train", "eval", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    imported.add(node.module.split(".")[0])
    others = imported - set(sys.stdlib_module_names) - {"diffalign", "reward_models"}
    optional = {name.partition("[")[0].strip().replace("-", "_") for name in OPTIONAL.splitlines() if name}
    assert others - optional == {IMPORTED_AS.get(name, name) for name in REQUIRED}


def test_every_floor_is_installed_by_ci_and_none_is_above_what_is_here() -> None:
    """The line of `.ci/run` that turns oldest versions into constraints gives exactly one per requirement."""
    (line,) = re.findall(r"^sed .*setup\.cfg.*$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    command = line.rsplit(" > ", 1)[0]
    pins = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    floored = REQUIRED | floors("options.extras_require", "test")
    assert pins.split() == [f"{name}=={floor}" for name, floor in floored.items()]
    for name, floor in floored.items():
        assert Version(version(name)) >= Version(floor), name


def test_the_readme_names_the_oldest_versions() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in ("torch", "diffusers", "transformers"):
        assert f"{name} {REQUIRED[name].removesuffix('.0')}" in readme


@pytest.mark.parametrize("folder", FILES)
def test_fast_and_slow_tokenizers_give_the_same_ids(folder: Path) -> None:
    """Older versions of transformers read vocab.json and merges.txt, newer ones tokenizer.json."""
    texts = [*captions(64, held_out=True), *ODD]
    call = {"padding": "max_length", "max_length": 12, "truncation": True}
    for part in folder.glob("tokenizer*"):
        kinds = (T5TokenizerFast,) if part.name == "tokenizer_3" else (CLIPTokenizer, CLIPTokenizerFast)
        ids = [kind.from_pretrained(part)(texts, **call).input_ids for kind in (AutoTokenizer, *kinds)]
        assert all(other == ids[0] for other in ids[1:]), part
        written = json.loads((part / "tokenizer.json").read_text())["model"]
        if written["type"] == "BPE":
            assert json.loads((part / "vocab.json").read_text()) == written["vocab"]
            merges = [" ".join(pair) for pair in written["merges"]]
            assert (part / "merges.txt").read_text().splitlines()[1:] == merges


def drawn(pipeline: DiffusionPipeline, prompts: list[str], *, steps: int, guidance: float = 2.0) -> Tensor:
    """Images of a playground pipeline in float32, [B, 3, 32, 32] in [0, 1]."""
    pipeline.to(torch.float32).set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    call = {"latents": torch.randn(len(prompts), 4, 16, 16, generator=g), "generator": g, "height": 32, "width": 32}
    call |= {"max_sequence_length": 8} if hasattr(pipeline, "tokenizer_3") else {}
    return pipeline(prompts, num_inference_steps=steps, guidance_scale=guidance, output_type="pt", **call).images


@pytest.mark.parametrize(("folder", "steps"), [(BASE, 10), (FLOW, 10), *((STUDENTS[n], n) for n in STUDENTS)])
def test_a_shipped_pipeline_draws_what_a_caption_says(folder: Path, steps: int) -> None:
    """transformers 4 initialises missing weights of text encoders at random, with only a warning."""
    prompts = captions(16, held_out=True)
    images = drawn(DiffusionPipeline.from_pretrained(folder), prompts, steps=steps, guidance=2 if steps == 10 else 1)
    seen = Judge().measure(images, prompts)
    assert all(seen[aspect].mean() >= 0.8 for aspect in ("colour", "shape", "background", "size")), seen


@pytest.mark.parametrize("folder", FILES)
def test_text_encoders_have_the_names_that_older_transformers_look_for(folder: Path) -> None:
    files = [f for f in folder.glob("text_encoder*/*.safetensors") if f.parent.name != "text_encoder_3"]
    names = [name for file in files for name in load_file(file)]
    assert names and all(name.startswith(("text_model.", "text_projection.")) for name in names)


@pytest.mark.parametrize("base", [BASE, FLOW], ids=["unet", "flow"])
def test_a_whole_export_loads_wherever_its_base_loads(tmp_path: Path, base: Path) -> None:
    """The same tokenizer files, the same classes, the same names of weights in text encoders, the same images."""
    out = tmp_path / "export"
    export(load_backbone(CPU, path=str(base)), out)
    prompts = captions(2, held_out=True)
    assert torch.equal(*(drawn(DiffusionPipeline.from_pretrained(f), prompts, steps=2) for f in (base, out)))
    indices = [json.loads((f / "model_index.json").read_text()) for f in (base, out)]
    assert all(indices[0][part] == indices[1][part] for part in indices[0] if not part.startswith("_"))
    for part in base.glob("tokenizer*"):
        assert {f.name for f in part.iterdir()} == {f.name for f in (out / part.name).iterdir()}
        for file in part.iterdir():
            assert file.read_bytes() == (out / part.name / file.name).read_bytes()
    for file in base.glob("text_encoder*/*.safetensors"):
        assert load_file(file).keys() == load_file(out / file.relative_to(base)).keys()


@pytest.fixture
def half() -> Iterator[None]:
    """accelerate keeps one precision per process, so its state is reset before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def moved() -> Iterator[dict[Tensor, bool]]:
    """Parameters of all optimizers, and whether their gradient was nonzero in at least one step."""
    seen: dict[Tensor, bool] = {}

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            reached = parameter.grad is not None and bool(parameter.grad.any())
            seen[parameter] = seen.get(parameter, False) or reached

    handle = register_optimizer_step_pre_hook(note)
    yield seen
    handle.remove()


@pytest.fixture
def choices(tmp_path: Path, pairs_file: Path) -> list[str]:
    """Pairs of one user and the user's embeddings."""
    rows = [json.loads(line) | {"annotator": "one"} for line in pairs_file.read_text().splitlines()]
    file = pairs_file.with_name("choices.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_file({"one": torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))}, tmp_path / "users")
    return [f"data.path={file}", f"users.path={tmp_path / 'users'}"]


FEW = ["hooks.sample_every=0", "hooks.checkpoint_every=0", "trainer.steps=2", "data.batch_size=2", "data.limit=4"]
FEW += ["run.mixed_precision=bf16", "backbone.dtype=bf16", "hooks.verify_export=false", "optimizer.lr_warmup_steps=0"]
FULL = ["backbone.lora_rank=0"]
DRAWN = ["monitor.prompts=null", "sampler.steps=2", "sampler.law=deterministic"]
RENOISED = ["monitor.prompts=null", "sampler.steps=2", "sampler.law=renoise"]
STUDENT = ["monitor.prompts=null", "algorithm.aux_rounds=1", "sampler.law=renoise"]
RECIPES: dict[str, tuple[str, list[str]]] = {
    "diffusion_dpo": ("diffusion_dpo", []),
    "diffusion_dpo full": ("diffusion_dpo", FULL),
    "inpo": ("inpo", ["inversion.steps=2"]),
    "inpo full": ("inpo", ["inversion.steps=2", *FULL]),
    "kto": ("kto", []),
    "rank_dpo": ("rank_dpo", []),
    "mapo": ("mapo", []),
    "sft full": ("sft", FULL),
    "refl": ("refl", [*DRAWN, "algorithm.first_step=1"]),
    "refl full": ("refl", [*DRAWN, "algorithm.first_step=1", *FULL]),
    "draft": ("draft", [*DRAWN, "algorithm.last_steps=1"]),
    "r0": ("r0", RENOISED),
    "pso": ("pso", RENOISED),
    "pso_offline full": ("pso_offline", [*FULL, "sampler.steps=2", "sampler.law=renoise"]),
    "diff_instruct_star": ("diff_instruct_star", STUDENT),
    "diff_instruct_star shared": ("diff_instruct_star", STUDENT),
    "diff_instruct_star full": ("diff_instruct_star", [*STUDENT, *FULL, "teacher.lora_rank=0"]),
    "distill": ("distill", ["algorithm.aux_rounds=1", "sampler.law=renoise"]),
    "ppd": ("ppd", []),
}


@pytest.mark.parametrize("case", RECIPES)
def test_in_bf16_everything_that_trains_has_a_gradient(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    smallest_sd: Path,
    tiny_sd: Path,
    recipe: Callable,
    half: None,
    moved: dict[Tensor, bool],
    case: str,
) -> None:
    """Two steps, because the A of a LoRA has no gradient in the first. Stock diffusers loads the export."""
    name, more = RECIPES[case]
    settings = [*FEW, f"run.folder={tmp_path / 'run'}", *(request.getfixturevalue("choices") if name == "ppd" else [])]
    settings += [f"backbone.path={smallest_sd}"]
    if name in ("diff_instruct_star", "distill"):
        settings += [f"teacher.path={smallest_sd if case.endswith('shared') else tiny_sd}"]
    recipe(name, "--config=playground", *settings, *more)
    still = [tuple(p.shape) for p, reached in moved.items() if not reached]
    assert moved
    assert not still, f"{len(still)} of {len(moved)} tensors got no gradient: {still[:5]}"
    folder = tmp_path / "run" / "export"
    if (folder / "model_index.json").exists():
        assert DiffusionPipeline.from_pretrained(folder).unet.dtype.is_floating_point
    elif name == "ppd":
        pipeline = DiffusionPipeline.from_pretrained(smallest_sd)
        pipeline.load_ip_adapter(
            str(folder), subfolder="", weight_name="user_adapter.safetensors", image_encoder_folder=None
        )
    else:
        pipeline = shared(smallest_sd)
        pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
        assert pipeline.get_list_adapters()
        pipeline.unload_lora_weights()
