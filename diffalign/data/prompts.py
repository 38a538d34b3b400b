"""Prompts: files of them, and the data set of the methods that train on samples of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from diffalign.data.cache import LatentCache, cond_of
from diffalign.data.image_checks import Workers
from diffalign.data.latents import cache_folder
from diffalign.playground.world import captions
from diffalign.types import Cond, Encoder, Key, PromptBatch
from reward_models.files import bad_name, parse_json, text_lines

PLAYGROUND_PROMPTS = 768


class Prompts(Dataset):
    """A list of prompts with their text embeddings, encoded once. Item (epoch, index) is that prompt.

    Positional: the encoder, the run's folder, this process's rank, how many there are, what waits for all of them.

    Args:
        path: .txt, one prompt a line; .jsonl of {"prompt": ..., "prompt_id": ...}; or playground
        batch_size: prompts a micro-batch and process
        resolution: width and height in pixels of the samples that are drawn
        cache: folder of text embeddings; default $DIFFALIGN_CACHE or ~/.cache/diffalign
        limit: use only the first so many prompts

    Raises FileNotFoundError, and ValueError for files that hold no prompts.
    """

    draws_per_sample = None
    num_workers = 0

    def __init__(
        self,
        encoder: Encoder,
        folder: Path,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], object] = lambda: None,
        *,
        path: str,
        batch_size: int = 8,
        resolution: int = 512,
        cache: str | None = None,
        limit: int | None = None,
    ):
        found = list(find_prompts(path).items())[:limit]
        self.ids, self.prompts, self.batch_size = [i for i, _ in found], [p for _, p in found], batch_size
        workers = Workers(rank, world_size, barrier, folder)
        store = LatentCache(cache_folder(cache), encoder, resolution, *workers)
        store.add_prompts(self.prompts)
        self._texts = store.texts(self.prompts)

    @staticmethod
    def check(cfg: dict[str, Any]) -> list[str]:
        """What cannot work in a `data` section, one line each."""
        problems = []
        try:
            find_prompts(cfg["path"])
        except (FileNotFoundError, ValueError) as error:
            problems.append(f"'data.path': {error}")
        for name in ("batch_size", "resolution", "limit"):
            if cfg[name] is not None and cfg[name] < 1:
                problems.append(f"'data.{name}' = {cfg[name]} must be 1 or more")
        return problems

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: tuple[int, int]) -> tuple[str, Cond, Key]:
        """Prompt `index`, its Cond of batch 1 and its key, from place = (epoch, index)."""
        epoch, index = place
        return self.prompts[index], cond_of(self._texts, index), (epoch, self.ids[index])

    def collate(self, items: Sequence[tuple[str, Cond, Key]]) -> PromptBatch:
        """Items -> a batch on the CPU."""
        prompts, conds, keys = zip(*items, strict=True)
        return PromptBatch(prompts, Cond.cat(conds), keys)

    def encode(self, batch: PromptBatch) -> PromptBatch:
        """The batch as it is: prompts are encoded already."""
        return batch


def find_prompts(path: str, *, held_out: bool = False) -> dict[str, str]:
    """prompt_id -> prompt of a file, or for `playground` of its training captions (or those held out of training)."""
    if path == "playground":
        return {f"{i:05d}": p for i, p in enumerate(captions(PLAYGROUND_PROMPTS, held_out=held_out))}
    return read_prompts(Path(path).expanduser())


def read_prompts(path: Path) -> dict[str, str]:
    """prompt_id -> prompt, in file order. Without an id it is the prompt's number, from 00000. Blank lines are skipped.

    Raises FileNotFoundError, and ValueError for other files, rows without a prompt and ids that come twice.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"prompts must end in .txt (one a line) or .jsonl; got '{path}'")
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist")
    prompts: dict[str, str] = {}
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        row = {"prompt": line.strip()} if path.suffix == ".txt" else _row(path, number, line)
        key = str(row.get("prompt_id", f"{len(prompts):05d}"))
        if key in prompts:
            raise ValueError(f"'{path}' line {number}: prompt_id {key!r} comes twice")
        prompts[key] = row["prompt"]
    if not prompts:
        raise ValueError(f"'{path}' holds no prompts")
    return prompts


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"'{path}' line {number} is {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f"'{path}' line {number} needs a string under \"prompt\"; got {line[:80].strip()}")
    if bad_name(row["prompt"]) or bad_name(str(row.get("prompt_id", ""))):
        raise ValueError(f"'{path}' line {number}: its prompt holds a NUL or is not valid Unicode")
    return row
