"""Images of a preference data set as latents ready for training: read, checked, encoded once, and drawn by key."""

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
    """One preference: a prompt with its images, best known first, and a score for each (NaN where there is none)."""

    id: str
    prompt: str
    images: tuple[ImageRef, ...]
    scores: tuple[float, ...]
    flip: float = 0.0
    annotator: str | None = None


class Item(NamedTuple):
    """One drawn example: its K images as latents [K, C, h, w] (or pixels [K, 3, R, R]), their sizes [K, 6], its Cond of
    batch 1 (or its prompt), and K scores."""

    x: Tensor
    size: Tensor
    text: Cond | str
    key: Key
    flip: float
    scores: tuple[float, ...]


class PixelBatch(NamedTuple):
    """A LatentBatch that is not encoded yet: x0 holds pixels [N, 3, R, R] in [0, 1], prompts stand for cond."""

    x0: Tensor
    prompts: Sequence[str]
    group: Tensor
    keys: Sequence[Key]
    flip: Tensor
    scores: Tensor
    size: Tensor


class PreferenceLatents(Dataset):
    """A preference data set as latents. Item (epoch, index) depends on nothing but the seed and the data.

    Crop, flip and caption dropout are drawn once an example, from its key (epoch, sample id), in the streams "crop",
    "hflip" and "caption_dropout". What cannot be used is listed with its reason in `<folder>/dropped.jsonl`.

    Positional: the encoder and the draws of the run, its folder, this process's rank, how many there are, what waits
    for all of them, and what is told of the records and images before any is read. What is strange and yet used, such
    as duplicates, is listed in `<folder>/notices.jsonl`.

    Args:
        path: .parquet file(s), .jsonl, a folder with w/ and l/, HPDv2 .json, or playground for the shipped pairs
        resolution: width and height in pixels; the shorter side is resized, the longer one cropped
        batch_size: pairs, ranked groups or single images a micro-batch and process
        crop: center, or random (needs cache = off)
        hflip: mirror half of the examples, drawn anew each epoch
        caption_dropout: share of the captions replaced by the empty one, drawn anew each epoch
        size_conditions: what SDXL is told of an image: its true size and crop, or always a full square
        cache: folder of latents and text embeddings; default $DIFFALIGN_CACHE or ~/.cache/diffalign; off to encode anew
        max_dropped: stop if more than this share of the labelled records is damaged
        limit: use only the first so many labelled records
        draws_per_sample: an example returns every so many epochs with the same flip, dropout, timestep and noise, so
            that the reference needs to see it only that often; new draws each epoch when left out
        num_workers: processes that prepare batches on each rank; 0 for none

    Raises ValueError when the settings are impossible, too much is damaged, or nothing is left.
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
        if problems := self.check(locals()):  # the config checker calls it with the same names
            raise ValueError("\n".join(problems))
        self.encoder: Encoder | None = encoder
        self.draws, self.resolution, self.batch_size, self.num_workers = draws, resolution, batch_size, num_workers
        self.crop, self.hflip, self.caption_dropout = crop, hflip, caption_dropout
        self.draws_per_sample, self.size_conditions = draws_per_sample, size_conditions
        workers = Workers(rank, world_size, barrier, folder)
        records, dropped = self.read(path, limit)
        report = DropReport(folder / "dropped.jsonl", rank == 0, path, max_dropped)
        report.stop_if_damaged(len(records), dropped)  # labels first: images may take hours
        images = list(dict.fromkeys(ref for record in records for ref in record.images))
        verify(records, images)
        store = None
        if cache == "off":
            found = check_images(images, resolution, workers)
        else:
            store = LatentCache(cache_folder(cache), encoder, resolution, *workers, hflip=hflip)
            found = store.add_images(images)
        seen = dict(zip(images, found, strict=True))
        records, damaged = usable_records(records, seen)
        dropped += damaged
        report.stop_if_damaged(len(records), dropped)
        self._arrange(records)
        report.summary(len(records), len(self), dropped)
        report.notice(lambda: notices_of(records, seen))
        if store is not None:
            self._locate(store, seen)

    read = staticmethod(read_some)

    @staticmethod
    def check(cfg: dict[str, Any]) -> list[str]:
        """What cannot work in a `data` section, one line each."""
        return check_latents(cfg)

    @staticmethod
    @abstractmethod
    def examples(records: Sequence[Record]) -> Iterator[Example]:
        """The examples that the usable records hold, in a fixed order."""

    def _arrange(self, records: Sequence[Record]) -> None:
        """Lay the examples out as flat lists, which worker processes share cheaply."""
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

    def _locate(self, store: LatentCache, seen: dict[ImageRef, ImageCheck]) -> None:
        """Find the latents and embeddings in the cache; images and prompts themselves are needed no more."""
        store.add_prompts(self.prompts)
        digests = [seen[ref].digest for ref in self.images]
        self._latents = [store.latents(digests, self.images, flipped=f) for f in ((False, True)[: 1 + self.hflip])]
        self._texts = store.texts(self.prompts)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: tuple[int, int]) -> Item:
        """Example `index` in `epoch`, from place = (epoch, index)."""
        epoch, index = place
        return self.draw((epoch, self.ids[index]), index)

    def draw(self, key: Key, index: int) -> Item:
        """Example `index` as drawn under a key."""
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
        """Items -> a batch on the CPU, every item's first image first; latents from the cache, pixels without one."""
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
        """Run the encoder on a batch of pixels, in the main process; a batch of latents is as it should be."""
        if isinstance(batch, LatentBatch):
            return batch
        assert self.encoder is not None, "encode() runs in the main process; workers have no encoder"
        x0, cond = self.encoder.encode_pixels(batch.x0).float(), self.encoder.encode_text(batch.prompts)
        return LatentBatch(x0, cond, *batch[2:])

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes get everything but the encoder, which may live on a GPU."""
        return {**self.__dict__, "encoder": None}


def check_latents(cfg: dict[str, Any]) -> list[str]:
    """What cannot work in a `data` section, one line each."""
    problems = []
    try:
        find_reader(cfg["path"])
    except (FileNotFoundError, ValueError) as error:
        problems.append(f"'data.path': {error}")
    if cfg["crop"] not in ("center", "random"):
        problems.append(f"'data.crop' = {cfg['crop']} must be center or random")
    if cfg["crop"] == "random" and cfg["cache"] != "off":
        problems.append("'data.crop' = random needs 'data.cache' = off: latents are cached for the centre crop only")
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
    """Where latents and embeddings are kept: as given, or $DIFFALIGN_CACHE, or ~/.cache/diffalign."""
    return Path(cache or os.environ.get("DIFFALIGN_CACHE") or "~/.cache/diffalign").expanduser()
