"""Latents and text embeddings, computed once and kept on disk for every later run.

An entry's key is the content of its image (or the prompt) and what was done to it, its folder the encoder and the rule
by which images are decoded: a changed image is another entry, the same image elsewhere is the same one. Images that
were seen before are recognised without reading them; see `known`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffalign.data.content_index import ContentIndex
from diffalign.data.image_checks import SHARD, CheckedImage, ImageCheck, Workers, check_image
from diffalign.data.images import Square, prefetch, square
from diffalign.data.records import ImageRef
from diffalign.data.shards import Mended, Shards, stored
from diffalign.types import Cond, Encoder
from reward_models.images import DECODING

logger = logging.getLogger(__name__)


class LatentCache:
    """The latents of images and the embeddings of prompts under one encoder, kept in `folder`.

    Images are resized and centre-cropped to `resolution`; with hflip, every image is there mirrored as well. Processes
    may build the same cache at the same time, and a build that was killed is taken up again: what is complete is used,
    at worst the same work is done twice. The encoder is called only for what is missing.

    rank, world_size, barrier and exchange say how the processes of this run share the work, as in Workers.

    Raises OSError when the folder cannot be written or is full, ValueError when the encoder gives numbers that are not
    finite.
    """

    def __init__(
        self,
        folder: Path,
        encoder: Encoder,
        resolution: int,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], object] = lambda: None,
        exchange: Path | None = None,
        *,
        hflip: bool = False,
        shard_size: int = SHARD,
    ):
        if world_size > 1 and exchange is None:
            raise ValueError(f"a cache built by {world_size} processes needs an 'exchange' folder of their run")
        self.encoder, self.resolution, self.shard_size = encoder, resolution, shard_size
        self.workers = Workers(rank, world_size, barrier, exchange or folder)
        self.variants = ("", "-hflip") if hflip else ("",)
        home = folder.expanduser() / encoder.fingerprint
        self._images = Shards(home / f"squares-{resolution}-center-decoding-{DECODING}")
        self._prompts = Shards(home / "texts")
        self.contents = ContentIndex(folder.expanduser() / "files")

    def add_images(self, images: Sequence[ImageRef]) -> list[ImageCheck]:
        """Encode what is missing. One Seen an image, the same list on every rank."""
        chunks = self.workers.chunks(len(images), self.shard_size)
        found: dict[int, ImageCheck] = {}
        new: list[int] = []
        with self.workers.bar(chunks, "latents") as bar:
            for chunk, digests in zip(
                chunks, self.contents.find_all([[images[i] for i in c] for c in chunks]), strict=True
            ):
                for i, digest in zip(chunk, digests, strict=True):
                    if seen := self.recall(digest):
                        found[i] = seen
                        bar.update()
                    else:
                        new.append(i)
            looks = prefetch(
                (images[i] for i in new),
                lambda ref: check_image(ref, self.resolution, self.contents.stamp, self.recall),
                processes=self.workers.world_size,
            )
            with closing(looks):
                for start in range(0, len(new), self.shard_size):
                    part = new[start : start + self.shard_size]
                    found |= zip(part, self._add_chunk(_ticking(islice(looks, len(part)), bar)), strict=True)
        self.contents.save()
        all_seen = self.workers.share(found, len(images))
        self._images.refresh()
        return all_seen

    def recall(self, digest: str) -> ImageCheck | None:
        """What is known of an image by the digest of its content; None where it is not in the cache."""
        if digest and all(digest + variant in self._images for variant in self.variants):
            return ImageCheck(digest, self._images.bad.get(digest, ""), self._images.notes.get(digest, ""))
        return None

    def _add_chunk(self, looks: Iterable[CheckedImage]) -> list[ImageCheck]:
        """Encode the pixels of one chunk and write its shard."""
        seen: list[ImageCheck] = []
        rows: dict[str, dict[str, Tensor]] = {}
        bad: dict[str, str] = {}
        stamps: list[tuple[bytes | None, str]] = []
        waiting: dict[str, Square] = {}
        size = max(1, min(64, 8 * 512**2 // self.resolution**2))
        for one, image, stamp in looks:
            seen.append(one)
            if one.digest:
                stamps.append((stamp, one.digest))
            if image is None:
                # What is not supported may be tomorrow, with another package.
                if one.digest and self.recall(one.digest) is None and not one.reason.startswith("unsupported"):
                    bad |= {one.digest + variant: one.reason for variant in self.variants}
                continue
            for variant in self.variants:
                key = one.digest + variant
                if key not in self._images and key not in rows:
                    waiting[key] = image.mirrored() if variant else image
            if len(waiting) >= size:
                rows |= self._encode(waiting)
                waiting = {}
        if waiting:
            rows |= self._encode(waiting)
        if rows or bad:
            self._images.write([*rows, *bad], rows, bad, {one.digest: one.note for one in seen if one.note})
        for stamp, digest in stamps:
            self.contents.add(stamp, digest)
        return seen

    @torch.no_grad()
    def _encode(self, images: dict[str, Square]) -> dict[str, dict[str, Tensor]]:
        latents = self.encoder.encode_pixels(torch.stack([x.pixels for x in images.values()])).cpu()
        return {
            key: {"latent": latent, "size": image.size}
            for (key, image), latent in zip(images.items(), latents, strict=True)
        }

    @torch.no_grad()
    def add_prompts(self, prompts: Iterable[str]) -> None:
        """Encode the prompts that are missing, and the empty one."""
        texts = {_digest(text): text for text in ["", *prompts]}
        keys = list(texts)
        chunks = self.workers.chunks(len(keys), self.shard_size)
        with self.workers.bar(chunks, "text embeddings") as bar:
            for chunk in chunks:
                missing = [keys[i] for i in chunk if keys[i] not in self._prompts]
                rows: dict[str, dict[str, Tensor]] = {}
                for start in range(0, len(missing), 32):
                    rows |= self._read([texts[key] for key in missing[start : start + 32]])
                if missing:
                    self._prompts.write(missing, rows, {}, self._longer([texts[key] for key in missing]))
                bar.update(len(chunk))
        self.workers.barrier()
        self._prompts.refresh()
        longer = [key for key in keys if key in self._prompts.notes]
        if longer and self.workers.rank == 0:
            note, first = self._prompts.notes[longer[0]], texts[longer[0]]
            logger.warning(
                "%d of %d prompts are longer than the text encoder reads, and cut there; the first: '%.80s...' (%s)",
                *(len(longer), len(keys) - 1, first, note),
            )

    def _longer(self, prompts: Sequence[str]) -> dict[str, str]:
        """Notes on those that are cut, by key."""
        if not (count := getattr(self.encoder, "token_counts", None)):
            return {}
        limit, counts = count(prompts)
        return {_digest(p): f"{n} tokens, {limit} are read" for p, n in zip(prompts, counts, strict=True) if n > limit}

    @torch.no_grad()
    def _read(self, prompts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        cond = self.encoder.encode_text(prompts)
        fields = {name: value.cpu() for name, value in cond._asdict().items() if value is not None}
        return {_digest(p): {name: value[k] for name, value in fields.items()} for k, p in enumerate(prompts)}

    def latents(self, digests: Sequence[str], images: Sequence[ImageRef], *, flipped: bool = False) -> Mended:
        """The rows of these images: "latent" [C, h, w] and "size" [6]. Raises ValueError when one was never added."""

        def again(i: int) -> dict[str, Tensor]:
            image = square(images[i].read(), self.resolution)
            return _kept(self._encode({"": image.mirrored() if flipped else image}))

        return Mended(self._images.rows([digest + "-hflip" * flipped for digest in digests]), again)

    def texts(self, prompts: Sequence[str]) -> Mended:
        """The rows of these prompts, one field for each of Cond's. Raises ValueError when one was never added."""
        return Mended(
            self._prompts.rows([_digest(text) for text in prompts]), lambda i: _kept(self._read([prompts[i]]))
        )


def _kept(rows: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """A row as it comes back from the disk."""
    ((key, row),) = rows.items()
    return {name: torch.from_numpy(stored(name, {key: value})[0]).float() for name, value in row.items()}


def cond_of(rows: Mended, i: int) -> Cond:
    """A row of `LatentCache.texts` as a Cond of batch 1."""
    return Cond(**{name: value[None] for name, value in rows.read(i).items()})


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _ticking(looks: Iterator[CheckedImage], bar: tqdm) -> Iterator[CheckedImage]:
    for one in looks:
        yield one
        bar.update()
