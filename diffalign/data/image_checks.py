"""What is found when images are looked at, and how the processes of a run share that work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from diffalign.data.images import Square, prefetch, square
from diffalign.data.records import ImageRef
from reward_models.files import read_json, write_whole

SHARD = 256
"""Images, or prompts, a shard."""


ENLARGED = 8
"""Images that are made so many times larger, or more, are worth a remark."""


class ImageCheck(NamedTuple):
    """One image: the digest of its bytes ("" when unreadable), why it cannot be used ("" when it can), and what is
    remarkable about it."""

    digest: str
    reason: str
    note: str = ""


class CheckedImage(NamedTuple):
    """An image as a thread hands it over, cut to a square where that is needed and can be done; its file's stamp."""

    seen: ImageCheck
    square: Square | None = None
    stamp: bytes | None = None


def check_image(
    ref: ImageRef,
    resolution: int,
    stamp_of: Callable[[ImageRef], bytes | None] = lambda ref: None,
    recall: Callable[[str], ImageCheck | None] = lambda digest: None,
) -> CheckedImage:
    """Read an image and decode it, unless `recall` knows its content. stamp_of is asked before it is read."""
    stamp = stamp_of(ref)
    try:
        data = ref.read()
    except FileNotFoundError:
        return CheckedImage(ImageCheck("", f"missing image: {ref}"))
    except OSError as error:
        return CheckedImage(ImageCheck("", f"unreadable image: {error.strerror or error}"))
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    if seen := recall(digest):
        return CheckedImage(seen, None, stamp)
    try:
        image = square(data, resolution)
    except ValueError as error:
        return CheckedImage(ImageCheck(digest, str(error)), None, stamp)
    height, width = (int(side) for side in image.size[:2])
    times = resolution // min(height, width)
    note = f"an image of {width} x {height} pixels, enlarged {times} times" if times >= ENLARGED else ""
    return CheckedImage(ImageCheck(digest, "", note), image, stamp)


class Workers(NamedTuple):
    """How the processes of one run share work: rank r takes the chunks r, r + world_size, ...

    exchange is a folder of this run that every rank sees; barrier returns when every rank has called it.
    """

    rank: int
    world_size: int
    barrier: Callable[[], object]
    exchange: Path

    def chunks(self, n: int, size: int) -> list[range]:
        """This rank's chunks of range(n)."""
        return [range(start, min(start + size, n)) for start in range(0, n, size)][self.rank :: self.world_size]

    def bar(self, chunks: list[range], what: str) -> tqdm:
        """A progress bar over the chunks, on the main rank."""
        return tqdm(total=sum(map(len, chunks)), desc=what, disable=self.rank > 0, mininterval=1, leave=False)

    def share(self, found: dict[int, ImageCheck], n: int) -> list[ImageCheck]:
        """Every rank's findings by number, put together, on every rank."""
        if self.world_size > 1:
            files = [self.exchange / f"seen-{rank}.json" for rank in range(self.world_size)]
            write_whole(files[self.rank], json.dumps(list(found.items())))
            self.barrier()
            if missing := [file.name for file in files if not file.exists()]:
                raise FileNotFoundError(
                    f"'{self.exchange}' lacks {', '.join(missing)} of the other processes; 'run.folder' must be one "
                    "folder that all of them see"
                )
            found = {i: ImageCheck(*seen) for file in files for i, seen in read_json(file)}
            self.barrier()
            files[self.rank].unlink()
        return [found[i] for i in range(n)]


def check_images(images: Sequence[ImageRef], resolution: int, workers: Workers) -> list[ImageCheck]:
    """Read and decode every image once, the processes sharing the work; keeps nothing but what was seen."""
    chunks = workers.chunks(len(images), SHARD)
    mine = [i for chunk in chunks for i in chunk]
    checks = prefetch(
        (images[i] for i in mine), lambda ref: check_image(ref, resolution).seen, processes=workers.world_size
    )
    found = {}
    with closing(checks), workers.bar(chunks, "check images") as bar:
        for i, seen in zip(mine, checks, strict=True):
            found[i] = seen
            bar.update()
    return workers.share(found, len(images))
