"""Batched scoring of image files. Threads decode images ahead of the scorers; several scorers share a decoded image."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from reward_models.base import NetworkScorer
from reward_models.folder.items import Item
from reward_models.images import ImageError, read_image, read_rgb, to_tensor
from reward_models.preprocess import ImageRule
from reward_models.protocol import Resizing, Scorer, checked, device_of

PREFETCH_BATCHES = 2
"""Number of batches decoded ahead; memory holds one more."""


class Scored(NamedTuple):
    """An item with its scores, in the order of the scorers."""

    item: Item
    scores: tuple[float, ...]


class Failed(NamedTuple):
    """An item that could not be scored, and the reason."""

    item: Item
    reason: str


Result = Scored | Failed


def score_files(
    scorer: Scorer,
    files: Sequence[str | os.PathLike[str]],
    prompts: Sequence[str],
    *,
    batch_size: int = 32,
    num_workers: int | None = None,
    name: str = "",
) -> Tensor:
    """Scores of image files with their prompts by one scorer: float32 [N] on the CPU, in the given order.

    name is the name of the scorer in errors; default: its class. Raises ValueError with the first file that cannot be
    read or whose score is not finite. `score_items` continues with the other files.
    """
    if len(files) != len(prompts):
        raise ValueError(f"expected one prompt per file; got {len(prompts)} prompts for {len(files)} files")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    items = [Item(str(file), prompt, Path(file)) for file, prompt in zip(files, prompts, strict=True)]
    work = (items[i : i + batch_size] for i in range(0, len(items), batch_size))
    scores: list[float] = []
    for results in score_items(work, {name or type(scorer).__name__: scorer}, num_workers=num_workers):
        for result in results:
            if isinstance(result, Failed):
                raise ValueError(f"cannot score '{result.item.image}': {result.reason}")
            scores += result.scores
    return torch.tensor(scores)


def score_items(
    work: Iterable[Sequence[Item]], scorers: Mapping[str, Scorer], *, num_workers: int | None = None
) -> Iterator[list[Result]]:
    """The results of every batch, in order. Files that cannot be read, or that get a score of nan or inf, are Failed.

    work         batches, consumed lazily
    scorers      name -> scorer
    num_workers  decoding threads (Pillow releases the GIL; worker processes were not faster); default: this process's
                 share of the machine's cores, at most 16
    """
    share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = num_workers or min(16, max(1, share))
    for items, images in _decoded(work, common_rule(scorers.values()), workers):
        good = [i for i, image in enumerate(images) if isinstance(image, Tensor)]
        pixels = [image for image in images if isinstance(image, Tensor)]
        prompts = [items[i].prompt for i in good]
        columns = {name: _score(name, scorer, pixels, prompts) for name, scorer in scorers.items()} if good else {}
        results: list[Result] = []
        position = {i: k for k, i in enumerate(good)}
        for i, (item, image) in enumerate(zip(items, images, strict=True)):
            if not isinstance(image, Tensor):
                results.append(Failed(item, image))
                continue
            scores = {name: column[position[i]] for name, column in columns.items()}
            bad = [f"scorer '{name}' returned {x}" for name, x in scores.items() if not math.isfinite(x)]
            results.append(Failed(item, "; ".join(bad)) if bad else Scored(item, tuple(scores.values())))
        yield results


def common_rule(scorers: Iterable[Scorer]) -> ImageRule | None:
    """The common rule of all scorers for which decoding threads can resize with Pillow; None if there is none.

    Without it, scorers get the full image."""
    rules = {
        x.rule if isinstance(x, NetworkScorer) and type(x).preprocess is NetworkScorer.preprocess else None
        for x in scorers
    }
    rule = rules.pop() if len(rules) == 1 else None
    return rule if rule is not None and rule.method == "pil" else None


def _decoded(
    work: Iterable[Sequence[Item]], rule: ImageRule | None, workers: int
) -> Iterator[tuple[Sequence[Item], list[Tensor | str]]]:
    """Batches with their images, uint8 [3, H, W], each image or the reason why it cannot be read."""
    waiting: deque[tuple[Sequence[Item], list[Future[Tensor | str]]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            for items in work:
                waiting.append((items, [pool.submit(_read, item, rule) for item in items]))
                if len(waiting) > PREFETCH_BATCHES:
                    items, images = waiting.popleft()
                    yield items, [image.result() for image in images]
            while waiting:
                items, images = waiting.popleft()
                yield items, [image.result() for image in images]
        finally:
            pool.shutdown(cancel_futures=True)


def _read(item: Item, rule: ImageRule | None) -> Tensor | str:
    if item.fault:
        return item.fault
    try:
        return read_image(item.path) if rule is None else to_tensor(rule.shrink(read_rgb(item.path)))
    except ImageError as error:
        return str(error)


@torch.no_grad()
def _score(name: str, scorer: Scorer, images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
    """Scores of one batch by one scorer; images uint8 [3, H, W] of any sizes."""
    device = device_of(scorer)
    sizes: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        sizes.setdefault(image.shape, []).append(i)
    groups = [(torch.stack([images[i] for i in group]), group) for group in sizes.values()]
    order = torch.tensor([i for group in sizes.values() for i in group]).argsort()
    if isinstance(scorer, Resizing):
        pixels = torch.cat([scorer.preprocess(x.to(device).float() / 255) for x, _ in groups])
        scores = scorer.score_pixels(pixels[order.to(pixels.device)], prompts)
    else:
        parts = [scorer.score(x.to(device).float() / 255, [prompts[i] for i in group]) for x, group in groups]
        scores = torch.cat([checked(name, part, len(g)) for part, (_, g) in zip(parts, groups, strict=True)])
        scores = scores[order.to(scores.device)]
    # The shortest decimal of the float32 number: tables stay readable, and all formats contain the same number.
    return [float(str(x)) for x in checked(name, scores, len(images)).cpu().numpy()]
