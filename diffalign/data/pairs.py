"""Preference pairs ready for training: read, checked, encoded once, and drawn by key."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffalign.data.cache import LatentCache, Ranks, Seen, check_images, cond_of
from diffalign.data.images import pixels
from diffalign.data.readers import find_reader
from diffalign.data.records import ImageRef, Record
from diffalign.data.usable import DropReport, read_some, usable_records
from diffalign.draws import Draws
from diffalign.types import Cond, Encoder, Key, PairBatch


class Item(NamedTuple):
    """One pair: winner and loser as latents [C, h, w] (or pixels [3, R, R]), its Cond of batch 1 (or its prompt)."""

    x_w: Tensor
    x_l: Tensor
    text: Cond | str
    key: Key
    weight: float
    flip: float


class PixelBatch(NamedTuple):
    """B pairs that are not encoded yet: pixels [2B, 3, R, R] in [0, 1], winners first; the rest as in PairBatch."""

    pixels: Tensor
    prompts: Sequence[str]
    keys: Sequence[Key]
    weight: Tensor
    flip: Tensor


class PreferencePairs(Dataset):
    """A preference data set as pairs of latents. Item (epoch, index) depends on nothing but the seed and the data.

    Crop, flip and caption dropout are drawn once a pair, from its key (epoch, sample id), in the streams "crop",
    "hflip" and "caption_dropout". What cannot be used is listed with its reason in `<folder>/dropped.jsonl`.

    Positional: the encoder and the draws of the run, its folder, this process's rank, how many there are, and what
    waits for all of them.

    Args:
        path: .parquet file(s), .jsonl, a folder with w/ and l/, HPDv2 .json, or playground for the shipped pairs
        resolution: width and height in pixels; the shorter side is resized, the longer one cropped
        batch_size: pairs a micro-batch and process
        crop: center, or random (needs cache = off)
        hflip: mirror half of the pairs, drawn anew each epoch
        caption_dropout: share of the captions replaced by the empty one, drawn anew each epoch
        cache: folder of latents and text embeddings; default $DIFFALIGN_CACHE or ~/.cache/diffalign; off to encode anew
        max_dropped: stop if more than this share of the labelled records is damaged
        limit: use only the first so many labelled records
        draws_per_pair: a pair returns every so many epochs with the same flip, dropout, timestep and noise, so that the
            reference needs to see it only that often; new draws each epoch when left out
        num_workers: processes that prepare batches on each rank; 0 for none

    Raises ValueError when the settings are impossible, too much is damaged, or no pair is left.
    """

    def __init__(
        self,
        encoder: Encoder,
        draws: Draws,
        folder: Path,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], object] = lambda: None,
        *,
        path: str,
        resolution: int = 512,
        batch_size: int = 1,
        crop: Literal["center", "random"] = "center",
        hflip: bool = False,
        caption_dropout: float = 0.0,
        cache: str | None = None,
        max_dropped: float = 0.05,
        limit: int | None = None,
        draws_per_pair: int | None = None,
        num_workers: int = 0,
    ):
        if problems := check_pairs(locals()):  # the config checker calls it with the same names
            raise ValueError("\n".join(problems))
        self.encoder: Encoder | None = encoder
        self.draws, self.resolution, self.batch_size, self.num_workers = draws, resolution, batch_size, num_workers
        self.crop, self.hflip, self.caption_dropout = crop, hflip, caption_dropout
        self.draws_per_pair = draws_per_pair
        ranks = Ranks(rank, world_size, barrier, folder)
        records, dropped = read_some(path, limit)
        report = DropReport(folder / "dropped.jsonl", rank == 0, path, max_dropped)
        report.stop_if_damaged(len(records), dropped)  # labels first: images may take hours
        images = list(dict.fromkeys(ref for record in records for ref in record.images))
        store = None
        if cache == "off":
            found = check_images(images, resolution, ranks)
        else:
            store = LatentCache(cache_folder(cache), encoder, resolution, *ranks, hflip=hflip)
            found = store.add_images(images)
        seen = dict(zip(images, found, strict=True))
        records, damaged = usable_records(records, seen)
        dropped += damaged
        report.stop_if_damaged(len(records), dropped)
        self._arrange(records)
        report.summary(len(records), len(self), dropped)
        if store is not None:
            self._locate(store, seen)

    def _arrange(self, records: Sequence[Record]) -> None:
        """Lay the pairs out as flat lists, which worker processes share cheaply."""
        numbers: dict[ImageRef, int] = {}
        prompts: dict[str, int] = {"": 0}
        ids, places, weights = [], [], []
        for record in records:
            text = prompts.setdefault(record.prompt, len(prompts))
            where = [numbers.setdefault(ref, len(numbers)) for ref in record.images]
            for w, l_ in record.pairs():
                ids.append(f"{record.id}#{w}-{l_}")
                places.append((where[w], where[l_], text))
                weights.append((record.weight, record.flip))
        self.ids: list[str] = ids
        self.images, self.prompts = list(numbers), list(prompts)
        self._places = torch.tensor(places, dtype=torch.int32).reshape(-1, 3)
        self._weights = torch.tensor(weights, dtype=torch.float32).reshape(-1, 2)
        self._latents: list[Any] = []
        self._texts: Any = None

    def _locate(self, store: LatentCache, seen: dict[ImageRef, Seen]) -> None:
        """Find the latents and embeddings in the cache; images and prompts themselves are needed no more."""
        store.add_prompts(self.prompts)
        digests = [seen[ref].digest for ref in self.images]
        self._latents = [store.latents(digests, flipped=f) for f in ((False, True) if self.hflip else (False,))]
        self._texts = store.texts(self.prompts)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: tuple[int, int]) -> Item:
        """Pair `index` in `epoch`, from place = (epoch, index)."""
        epoch, index = place
        key = (epoch, self.ids[index])
        w, l_, text = self._places[index].tolist()
        weight, flip_probability = self._weights[index].tolist()
        mirrored = self.hflip and self._uniform(key, "hflip") < 0.5
        if self.caption_dropout and self._uniform(key, "caption_dropout") < self.caption_dropout:
            text = 0
        if self._latents:
            latents = self._latents[mirrored]
            x_w, x_l = latents.read(w)["latent"], latents.read(l_)["latent"]
            return Item(x_w, x_l, cond_of(self._texts, text), key, weight, flip_probability)
        at = self._uniform(key, "crop") if self.crop == "random" else 0.5
        x_w, x_l = (pixels(self.images[i].read(), self.resolution, at=at, flip=mirrored) for i in (w, l_))
        return Item(x_w, x_l, self.prompts[text], key, weight, flip_probability)

    def _uniform(self, key: Key, stream: str) -> float:
        return self.draws.uniform([key], stream=stream).item()

    def collate(self, items: Sequence[Item]) -> PairBatch | PixelBatch:
        """Items -> a batch on the CPU, winners first; latents from the cache, pixels without one."""
        x = torch.stack([i.x_w for i in items] + [i.x_l for i in items])
        keys = [i.key for i in items]
        weight, flip = (torch.tensor([getattr(i, name) for i in items]) for name in ("weight", "flip"))
        texts = [i.text for i in items]
        if self._latents:
            return PairBatch(x, Cond.cat(texts), keys, weight, flip)  # type: ignore[arg-type]
        return PixelBatch(x, texts, keys, weight, flip)  # type: ignore[arg-type]

    @torch.no_grad()
    def encode(self, batch: PairBatch | PixelBatch) -> PairBatch:
        """Run the encoder on a batch of pixels, in the main process; a batch of latents is as it should be."""
        if isinstance(batch, PairBatch):
            return batch
        assert self.encoder is not None, "encode() runs in the main process; workers have no encoder"
        x0 = self.encoder.encode_pixels(batch.pixels).float()
        return PairBatch(x0, self.encoder.encode_text(batch.prompts), batch.keys, batch.weight, batch.flip)

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes get everything but the encoder, which may live on a GPU."""
        return {**self.__dict__, "encoder": None}


def check_pairs(cfg: dict[str, Any]) -> list[str]:
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
    for name in ("resolution", "batch_size", "limit", "draws_per_pair"):
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
