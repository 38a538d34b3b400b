"""Preference data sets as latents for training: images are read, checked and encoded once; augmentation is keyed."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffalign.data.cache import LatentCache, cond_of
from diffalign.data.filtering import DropReport, Verify, notices_of, read_some, usable_records
from diffalign.data.image_checks import ImageCheck, Workers, check_images
from diffalign.data.images import square
from diffalign.data.readers import find_reader
from diffalign.data.records import ImageRef, Record
from diffalign.draws import Draws
from diffalign.types import Cond, Encoder, Key, LatentBatch


class Example(NamedTuple):
    """One training example: a prompt with K images, the winner first, and a score per image (NaN for none)."""

    id: str
    prompt: str
    images: tuple[ImageRef, ...]
    scores: tuple[float, ...]
    flip: float = 0.0
    annotator: str | None = None


class Item(NamedTuple):
    """One example after random augmentation.

    x       latents [K, C, h, w], or pixels [K, 3, R, R] without a cache
    size    size conditions [K, 6]
    text    Cond of batch size 1, or the prompt without a cache
    scores  K scores
    """

    x: Tensor
    size: Tensor
    text: Cond | str
    key: Key
    flip: float
    scores: tuple[float, ...]


class PixelBatch(NamedTuple):
    """LatentBatch before encoding: x0 holds pixels [N, 3, R, R] in [0, 1], and prompts replace cond."""

    x0: Tensor
    prompts: Sequence[str]
    group: Tensor
    keys: Sequence[Key]
    flip: Tensor
    scores: Tensor
    size: Tensor


class PreferenceLatents(Dataset):
    """Preference data set of latents. Item (epoch, index) depends only on the seed and the data.

    Crop, flip and caption dropout are drawn once per example, from its key (epoch, sample id), in the streams "crop",
    "hflip" and "caption_dropout". Records that cannot be used are listed with reasons in `<folder>/dropped.jsonl`.
    Warnings about records that are used, such as duplicates, are listed in `<folder>/notices.jsonl`.

    Positional: the encoder, the run's draws, its folder, rank, world size, a barrier of all ranks, and a callback that
    gets the records and images before any image is read.

    Args:
        path: .parquet file(s), .jsonl, a folder with w/ and l/, HPDv2 .json, or playground for the shipped pairs
        resolution: width and height in pixels; the shorter side is resized, the longer one cropped
        batch_size: pairs, ranked groups or single images per micro-batch on each rank
        crop: center, or random (needs cache = off)
        hflip: mirror an example with probability 1/2, drawn anew each epoch
        caption_dropout: probability of replacing a caption by the empty one, drawn anew each epoch
        size_conditions: SDXL size conditions of an image: true size and crop, or always an uncropped square
        cache: folder of latents and text embeddings; default $DIFFALIGN_CACHE or ~/.cache/diffalign; off encodes each
            step anew
        max_dropped: stop if more than this share of the labelled records is damaged
        limit: use only the first so many labelled records
        draws_per_sample: number of different draws (flip, dropout, timestep, noise) per example, repeated in turn over
            the epochs, so that reference predictions can be cached; new draws each epoch when left out
        num_workers: worker processes per rank that prepare batches; 0 prepares them in the main process

    Raises ValueError when settings are invalid, too many records are damaged, or no usable record is left.
    """

    def __init__(
        self,
        encoder: Encoder,
        draws: Draws,
        folder: Path,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], object] = lambda: None,
        verify: Verify = lambda records, images: None,
        *,
        path: str,
        resolution: int = 512,
        batch_size: int = 1,
        crop: Literal["center", "random"] = "center",
        hflip: bool = False,
        caption_dropout: float = 0.0,
        size_conditions: Literal["true", "square"] = "true",
        cache: str | None = None,
        max_dropped: float = 0.05,
        limit: int | None = None,
        draws_per_sample: int | None = None,
        num_workers: int = 0,
    ):
        if problems := self.check(locals()):  # the same names as in a config section
            raise ValueError("\n".join(problems))
        self.encoder: Encoder | None = encoder
        self.draws, self.resolution, self.batch_size, self.num_workers = draws, resolution, batch_size, num_workers
        self.crop, self.hflip, self.caption_dropout = crop, hflip, caption_dropout
        self.draws_per_sample, self.size_conditions = draws_per_sample, size_conditions
        workers = Workers(rank, world_size, barrier, folder)
        records, dropped = self.read(path, limit)
        report = DropReport(folder / "dropped.jsonl", rank == 0, path, max_dropped)
        report.stop_if_damaged(len(records), dropped)  # before the images, which may take hours
        images = list(dict.fromkeys(ref for record in records for ref in record.images))
        verify(records, images)
        store = None
        if cache == "off":
            found = check_images(images, resolution, workers)
        else:
            store = LatentCache(cache_folder(cache), encoder, resolution, *workers, hflip=hflip)
            found = store.add_images(images)
        checks = dict(zip(images, found, strict=True))
        records, damaged = usable_records(records, checks)
        dropped += damaged
        report.stop_if_damaged(len(records), dropped)
        self._arrange(records)
        report.summary(len(records), len(self), dropped)
        report.notice(lambda: notices_of(records, checks))
        if store is not None:
            self._locate(store, checks)

    read = staticmethod(read_some)

    @staticmethod
    def check(cfg: dict[str, Any]) -> list[str]:
        """Problems with a `data` section, one line each."""
        return check_latents(cfg)

    @staticmethod
    @abstractmethod
    def examples(records: Sequence[Record]) -> Iterator[Example]:
        """Training examples of the usable records, in a fixed order."""

    def _arrange(self, records: Sequence[Record]) -> None:
        """Store the examples as flat lists and tensors, which are cheap to share with worker processes."""
        numbers: dict[ImageRef, int] = {}
        prompts: dict[str, int] = {"": 0}
        ids, texts, flips, starts, annotators = [], [], [], [0], []
        members: list[int] = []
        scores: list[float] = []
        for one in self.examples(records):
            ids.append(one.id)
            annotators.append(one.annotator)
            texts.append(prompts.setdefault(one.prompt, len(prompts)))
            flips.append(one.flip)
            members += [numbers.setdefault(ref, len(numbers)) for ref in one.images]
            scores += one.scores
            starts.append(len(members))
        self.ids: list[str] = ids
        self.annotators: list[str | None] = annotators
        self.images, self.prompts = list(numbers), list(prompts)
        self._texts_of, self._starts = torch.tensor(texts, dtype=torch.int32), torch.tensor(starts)
        self._members, self._scores = torch.tensor(members, dtype=torch.int32), torch.tensor(scores)
        self._flips = torch.tensor(flips, dtype=torch.float32)
        self._latents: list[Any] = []
        self._texts: Any = None

    def _locate(self, store: LatentCache, checks: dict[ImageRef, ImageCheck]) -> None:
        """Locate the latents and embeddings in the cache, from which items are read."""
        store.add_prompts(self.prompts)
        digests = [checks[ref].digest for ref in self.images]
        self._latents = [store.latents(digests, self.images, flipped=f) for f in ((False, True)[: 1 + self.hflip])]
        self._texts = store.texts(self.prompts)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: tuple[int, int]) -> Item:
        """Example `index` in `epoch`; place = (epoch, index)."""
        epoch, index = place
        return self.draw((epoch, self.ids[index]), index)

    def draw(self, key: Key, index: int) -> Item:
        """Example `index` with the augmentation drawn from `key`."""
        here = slice(*self._starts[index : index + 2].tolist())
        members, scores = self._members[here].tolist(), tuple(self._scores[here].tolist())
        flip = self._flips[index].item()
        mirrored = self.hflip and self._uniform(key, "hflip") < 0.5
        dropped = self.caption_dropout and self._uniform(key, "caption_dropout") < self.caption_dropout
        text = 0 if dropped else int(self._texts_of[index])
        if self._latents:
            rows = [self._latents[mirrored].read(i) for i in members]
            x, size = (torch.stack([row[name] for row in rows]) for name in ("latent", "size"))
            return Item(x, size, cond_of(self._texts, text), key, flip, scores)
        at = self._uniform(key, "crop") if self.crop == "random" else 0.5
        squares = [square(self.images[i].read(), self.resolution, at=at) for i in members]
        squares = [one.mirrored() for one in squares] if mirrored else squares
        x, size = (torch.stack(parts) for parts in zip(*squares, strict=True))
        return Item(x, size, self.prompts[text], key, flip, scores)

    def _uniform(self, key: Key, stream: str) -> float:
        return self.draws.uniform([key], stream=stream).item()

    def collate(self, items: Sequence[Item]) -> LatentBatch | PixelBatch:
        """Batch of items, on the CPU: first images (winners) of all items, then second ones, and so on.

        A LatentBatch with a cache, a PixelBatch without.
        """
        order = [(k, g) for k in range(max(len(i.x) for i in items)) for g, i in enumerate(items) if k < len(i.x)]
        x, size = (torch.stack([getattr(items[g], name)[k] for k, g in order]) for name in ("x", "size"))
        if self.size_conditions == "square":
            size = torch.tensor([1.0, 1, 0, 0, 1, 1]) * self.resolution + torch.zeros_like(size)
        group, scores = torch.tensor([g for _, g in order]), torch.tensor([items[g].scores[k] for k, g in order])
        flip = torch.tensor([i.flip for i in items])
        texts: Any = [i.text for i in items]
        rest = (group, [i.key for i in items], flip, scores, size)
        return LatentBatch(x, Cond.cat(texts), *rest) if self._latents else PixelBatch(x, texts, *rest)

    @torch.no_grad()
    def encode(self, batch: LatentBatch | PixelBatch) -> LatentBatch:
        """Encode a batch of pixels, in the main process. A batch of latents is returned unchanged."""
        if isinstance(batch, LatentBatch):
            return batch
        assert self.encoder is not None, "encode() runs in the main process; workers have no encoder"
        x0, cond = self.encoder.encode_pixels(batch.x0).float(), self.encoder.encode_text(batch.prompts)
        return LatentBatch(x0, cond, *batch[2:])

    def __getstate__(self) -> dict[str, Any]:
        """State for worker processes, without the encoder, which may be on a GPU."""
        return {**self.__dict__, "encoder": None}


def check_latents(cfg: dict[str, Any]) -> list[str]:
    """Problems with a `data` section, one line each."""
    problems = []
    try:
        find_reader(cfg["path"])
    except (FileNotFoundError, ValueError) as error:
        problems.append(f"'data.path': {error}")
    if cfg["crop"] not in ("center", "random"):
        problems.append(f"'data.crop' = {cfg['crop']} must be center or random")
    if cfg["crop"] == "random" and cfg["cache"] != "off":
        problems.append("'data.crop' = random needs 'data.cache' = off: only latents of the centre crop are cached")
    for name in ("resolution", "batch_size", "limit", "draws_per_sample"):
        if cfg[name] is not None and cfg[name] < 1:
            problems.append(f"'data.{name}' = {cfg[name]} must be 1 or more")
    if cfg["num_workers"] < 0:
        problems.append(f"'data.num_workers' = {cfg['num_workers']} must be 0 or more")
    for name in ("caption_dropout", "max_dropped"):
        if not 0 <= cfg[name] <= 1:
            problems.append(f"'data.{name}' = {cfg[name]} must be in [0, 1]")
    return problems


def cache_folder(cache: str | None) -> Path:
    """Folder of the cache: as given, else $DIFFALIGN_CACHE, else ~/.cache/diffalign."""
    return Path(cache or os.environ.get("DIFFALIGN_CACHE") or "~/.cache/diffalign").expanduser()
