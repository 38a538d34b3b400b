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
"""Batches that are decoded before they are needed; memory holds one more."""


class Scored(NamedTuple):
    """An item with its score by every scorer, in the scorers' order."""

    item: Item
    scores: tuple[float, ...]


class Failed(NamedTuple):
    """An item without a score, and the reason."""

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
    """Score image files, each with its prompt, by one scorer -> float32 [N] in their order, on the CPU.

    name is what errors call the scorer, its class when left out. Raises ValueError naming the first file that cannot
    be read or whose score is not finite. Command lines that go on with the other files use `score_items`.
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
    """The results of every batch, in order. A file that cannot be read, or that a scorer gives nan or inf, is Failed.

    work         batches, taken as they are needed
    scorers      name -> scorer
    num_workers  threads that decode (Pillow frees the interpreter while it works; worker processes were no faster);
                 default: this process's share of the machine's cores, at most 16
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
    """The rule by which Pillow can resize an image once for all scorers, in the threads that decode; None if there is
    none, and they get the whole image."""
    rules = {
        x.rule if isinstance(x, NetworkScorer) and type(x).preprocess is NetworkScorer.preprocess else None
        for x in scorers
    }
    rule = rules.pop() if len(rules) == 1 else None
    return rule if rule is not None and rule.method == "pil" else None


def _decoded(
    work: Iterable[Sequence[Item]], rule: ImageRule | None, workers: int
) -> Iterator[tuple[Sequence[Item], list[Tensor | str]]]:
    """Every batch with its images, uint8 [3, H, W], or the reason why there is none."""
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
    """The scores of one batch by one scorer; images uint8 [3, H, W] of any sizes."""
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
    # The shortest decimal that means the same float32: tables stay readable and every format holds the same number.
    return [float(str(x)) for x in checked(name, scores, len(images)).cpu().numpy()]
