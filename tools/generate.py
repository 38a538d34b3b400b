"""Generate images for a list of prompts with any Stable Diffusion pipeline, from noise fixed per prompt.

    diffalign generate --pipeline playground --prompts prompts.txt --out images
    python tools/generate.py --pipeline stable-diffusion-v1-5/stable-diffusion-v1-5 --lora runs/dpo/export \
        --prompts prompts.jsonl --samples-per-prompt 4 --dtype fp16 --out aligned
    accelerate launch tools/generate.py ...        # splits the prompts over all processes

Writes OUT/images/*.png, OUT/manifest.jsonl (one line per image: image, prompt, prompt_id, seed, sample) and
OUT/settings.json. To continue a killed run, run the same command again.

The initial noise of (prompt_id, sample) depends only on the seed, not on the pipeline, the batch or the number of
processes: images of two models with the same prompts and seed are paired. Safety checkers are switched off, because
their black images would be scored like any other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from diffalign.commands import program
from reward_models.files import read_json, replacing, weights_digest, write_lines, write_whole, writing

if TYPE_CHECKING:
    import torch


class Task(NamedTuple):
    """One image to generate."""

    prompt: str
    prompt_id: str
    sample: int
    image: str  # path relative to the output folder


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        generate(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pipeline", required=True, help="diffusers folder, hub id, or `playground`, `playground_flow` (shipped)")
    add("--lora", type=Path, help="LoRA folder or file as diffusers, kohya or peft writes it, such as export/")
    add("--user-adapter", type=Path, metavar="FOLDER", help="export/ of a train/ppd.py run")
    add(
        "--user",
        type=Path,
        action="append",
        metavar="FILE",
        help="user file of `diffalign user fit`; several are mixed",
    )
    add("--user-weights", type=float, nargs="+", metavar="W", help="mixture weights, one for each --user (equal)")
    add(
        "--prompts", type=Path, required=True, help='.txt, one per line; or .jsonl of {"prompt": ..., "prompt_id": ...}'
    )
    add("--out", type=Path, required=True, help="output folder")
    add("--samples-per-prompt", type=int, default=1, metavar="N", help="images of each prompt, from different noise")
    add("--steps", type=int, default=50, help="denoising steps (50)")
    add(
        "--timesteps",
        type=int,
        nargs="+",
        metavar="T",
        help="timesteps of a distilled model, instead of --steps (399 for DMD2)",
    )
    add("--guidance", type=float, default=7.5, help="guidance scale as in `sampler.guidance` (7.5); 1 for none")
    add("--size", type=int, metavar="PX", help="width and height; default: the model's training resolution")
    add("--max-sequence-length", type=int, metavar="N", help="tokens of a prompt, not CLIP's; default: the pipeline's")
    add("--batch-size", type=int, default=8, metavar="B", help="images at once (8); lower it when memory runs out")
    add("--seed", type=int, default=0, help="seed of the noise (0); compare models at the same seed")
    add("--device", default="auto", help="auto (one GPU per process, else the CPU), cpu, cuda:1, ...")
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="dtype of the weights (fp32)")
    return parser


def generate(args: argparse.Namespace) -> None:
    """Generate this process's share of the missing images; the main process writes the manifest."""
    import torch  # here and below: lazy, `--help` does not need them
    from accelerate import PartialState

    from diffalign.data.prompts import read_prompts
    from diffalign.networks.loading import call_of
    from diffalign.networks.user_adapter import adapter_arguments

    for name in ("samples_per_prompt", "steps", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(args, name)}")
    prompts = read_prompts(args.prompts)
    tasks = [
        Task(prompt, key, k, f"images/{i:05d}_{k}.png")
        for i, (key, prompt) in enumerate(prompts.items())
        for k in range(args.samples_per_prompt)
    ]
    state = PartialState(cpu=args.device == "cpu")
    pipe = load(args.pipeline, args.lora, args.dtype)
    if bool(args.user_adapter) != bool(args.user):
        raise ValueError("--user-adapter and --user belong together; give both or neither")
    if args.user_adapter:
        user_embeddings(args)  # fails on invalid files before anything is written
        pipe.load_ip_adapter(**adapter_arguments(args.user_adapter))
    shape = latent_shape(pipe, args.size)
    size = args.size or call_of(pipe).training_size(pipe)
    if state.is_main_process:
        claim(args.out, settings(args, size, prompts))
    state.wait_for_everyone()
    # The last bits of the pixels depend on the batch, so batches are formed before they are distributed or skipped.
    batches = [tasks[i : i + args.batch_size] for i in range(0, len(tasks), args.batch_size)]
    todo = [b for b in batches if not all((args.out / task.image).exists() for task in b)]
    state.wait_for_everyone()  # no process writes before all have listed the missing images
    mine = todo[state.process_index :: state.num_processes]
    pipe.to(state.device if args.device == "auto" else torch.device(args.device))
    bar = tqdm(total=sum(map(len, mine)), desc="generate", unit="image", disable=not state.is_main_process)
    for batch in mine:
        _make(pipe, batch, args, shape, size)
        bar.update(len(batch))
    bar.close()
    state.wait_for_everyone()
    if state.is_main_process:
        rows = [{**task._asdict(), "seed": args.seed} for task in tasks]
        order = ("image", "prompt", "prompt_id", "seed", "sample")
        write_lines(args.out / "manifest.jsonl", ({k: row[k] for k in order} for row in rows))
        print(f"{len(tasks)} images of {len(prompts)} prompts in '{args.out}'")


def load(name: str, lora: Path | None, dtype: str) -> Any:
    """Load a pipeline on the CPU, without a safety checker. Raises the errors of `find_pipeline` and `load_lora`."""
    import diffusers

    from diffalign.networks.loading import find_pipeline
    from diffalign.networks.lora_files import load_lora, lora_file
    from diffalign.networks.placement import DTYPES

    if lora is not None:
        lora_file(lora)  # before anything loads
    path = find_pipeline(name)
    program.quiet()
    parts = diffusers.DiffusionPipeline.load_config(path)
    off = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in parts else {}
    with warnings.catch_warnings():
        # Older supported versions of diffusers do not accept the new name `dtype`.
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        pipe = diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=DTYPES[dtype], **off)
    if lora is not None:
        load_lora(pipe, lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def user_embeddings(args: argparse.Namespace) -> list[torch.Tensor] | None:
    """User embedding of all images in the pipeline's format; several users are mixed. Raises ValueError."""
    if not args.user:
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from diffalign.networks.user_adapter import mix_users, user_embeds

    users = []
    for file in args.user:
        try:
            users.append(load_file(file)["embeds"])
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"--user '{file}' is not a user file ({error!r}); `diffalign user fit` writes one"
            ) from error
    return user_embeds(mix_users(users, args.user_weights or [1.0] * len(users)), guidance=args.guidance)


def latent_shape(pipe: Any, size: int | None) -> tuple[int, int, int]:
    """Shape [C, h, w] of the initial latents of a square image; default size: the training resolution."""
    from diffalign.networks.loading import call_of

    call = call_of(pipe)
    channels, pixels, step = call.latent_units(pipe)
    if size is not None and (size % step or size < 1):
        raise ValueError(f"--size must be a positive multiple of {step}; got {size}")
    side = (size or call.training_size(pipe)) // pixels
    return channels, side, side


def settings(args: argparse.Namespace, size: int, prompts: dict[str, str]) -> dict[str, Any]:
    """Settings that determine the images, for settings.json."""
    import accelerate
    import diffusers
    import torch
    import transformers

    from diffalign.playground import SHIPPED

    names = ("samples_per_prompt", "steps", "timesteps", "guidance", "seed", "dtype", "max_sequence_length")
    own = {k: getattr(args, k) for k in names}
    return {
        "pipeline": args.pipeline,
        "pipeline_weights": weights_digest(Path(SHIPPED.get(args.pipeline, args.pipeline))),
        "lora": None if args.lora is None else str(args.lora),
        "lora_weights": None if args.lora is None else weights_digest(args.lora),
        "user_adapter": None if args.user_adapter is None else weights_digest(args.user_adapter),
        "users": None if not args.user else [weights_digest(file) for file in args.user],
        "user_weights": args.user_weights,
        "prompts": f"{len(prompts)} prompts, sha256 {hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:12]}",
        **own,
        "size": size,
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers, accelerate)},
    }


def claim(out: Path, now: dict[str, Any]) -> None:
    """Write settings.json, or compare with the existing one. Raises ValueError naming the setting that differs."""
    path = out / "settings.json"
    (out / "images").mkdir(parents=True, exist_ok=True)
    if path.exists():
        before = read_json(path)
        if not isinstance(before, dict):
            raise ValueError(f"'{path}' contains no settings; choose another --out or delete that folder")
        for key in now:
            if before.get(key) != now[key]:
                raise ValueError(
                    f"'{out}' was generated with {key} = {before.get(key)!r}, now it is {now[key]!r}; restore the "
                    "setting, choose another --out or delete that folder"
                )
    elif any((out / "images").iterdir()):
        raise ValueError(f"'{out}/images' contains files but '{path}' does not exist; choose another --out")
    write_whole(path, json.dumps(now, indent=2) + "\n")


def _make(pipe: Any, batch: list[Task], args: argparse.Namespace, shape: tuple[int, ...], size: int) -> None:
    import torch

    from diffalign.draws import Draws
    from diffalign.networks.loading import call_of

    draws, keys = Draws(args.seed), [(task.prompt_id, task.sample) for task in batch]
    latents = draws.normal(keys, shape, stream="latents").to(pipe.device, pipe.dtype)
    call = call_of(pipe)
    user = user_embeddings(args)
    pixels = pipe(
        prompt=[task.prompt for task in batch],
        latents=call.pipeline_latents(latents),
        **({} if user is None else {"ip_adapter_image_embeds": [x.to(pipe.device, pipe.dtype) for x in user]}),
        generator=[draws.generator(key, "sampler") for key in keys],  # for samplers that add noise between steps
        **({"timesteps": args.timesteps} if args.timesteps else {"num_inference_steps": args.steps}),
        **call.guidance_call(args.guidance, len(batch)),
        height=size,
        width=size,
        output_type="pt",
        **({} if args.max_sequence_length is None else {"max_sequence_length": args.max_sequence_length}),
    ).images.float()
    for task, image in zip(batch, pixels, strict=True):
        if not torch.isfinite(image).all():
            raise FloatingPointError(
                f"the image of prompt_id {task.prompt_id!r}, sample {task.sample} is not finite; "
                "try --dtype bf16 or fp32"
            )
        array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        path = args.out / task.image
        with replacing(path) as temporary, writing(temporary):
            Image.fromarray(array).save(temporary, format="PNG")


if __name__ == "__main__":
    program.run(main)
