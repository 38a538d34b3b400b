"""Checks of all images before training, divided among the ranks of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from diffalign.data.images import Crop, cropped, prefetch
from diffalign.data.records import ImageRef
from diffalign.types import Size, sides
from reward_models.files import read_json, write_whole

T = TypeVar("T")

SHARD = 256
"""Images, or prompts, per shard."""
ENLARGED = 8
"""Images enlarged by this factor or more get a note."""


class ImageCheck(NamedTuple):
    """Result of checking one image.

    digest  hash of its bytes; "" when unreadable
    reason  why it cannot be used; "" when it can
    note    warning about an image that is used; "" for none
    """

    digest: str
    reason: str
    note: str = ""


class CheckedImage(NamedTuple):
    """A checked image with its crop (None when cached or not usable) and its file's stamp (ContentIndex)."""

    check: ImageCheck
    crop: Crop | None = None
    stamp: bytes | None = None


def check_image(
    ref: ImageRef,
    size: int | Size,
    stamp_of: Callable[[ImageRef], bytes | None] = lambda ref: None,
    recall: Callable[[str], ImageCheck | None] = lambda digest: None,
) -> CheckedImage:
    """Read an image and decode it, unless `recall` finds its content in the cache.

    stamp_of is called before the image is read, so that a change in between is noticed later.
    """
    stamp = stamp_of(ref)
    try:
        data = ref.read()
    except FileNotFoundError:
        return CheckedImage(ImageCheck("", f"missing image: {ref}"))
    except OSError as error:
        return CheckedImage(ImageCheck("", f"unreadable image: {error.strerror or error}"))
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    if check := recall(digest):
        return CheckedImage(check, None, stamp)
    try:
        image = cropped(data, size)
    except ValueError as error:
        return CheckedImage(ImageCheck(digest, str(error)), None, stamp)
    height, width = (int(side) for side in image.size[:2])
    factor = max(now // side for now, side in zip(sides(size), (height, width), strict=True))
    note = f"an image of {width} x {height} pixels, enlarged {factor} times" if factor >= ENLARGED else ""
    return CheckedImage(ImageCheck(digest, "", note), image, stamp)


class Workers(NamedTuple):
    """Division of work among the ranks of one run: rank r takes the chunks r, r + world_size, ...

    exchange is a folder of this run on a file system that all ranks share. barrier returns when every rank has called
    it.
    """

    rank: int
    world_size: int
    barrier: Callable[[], object]
    exchange: Path

    def chunks(self, n: int, size: int) -> list[range]:
        """This rank's chunks of range(n)."""
        return [range(start, min(start + size, n)) for start in range(0, n, size)][self.rank :: self.world_size]

    def progress_bar(self, chunks: list[range], what: str) -> tqdm:
        """A progress bar over the chunks, on the main rank."""
        return tqdm(total=sum(map(len, chunks)), desc=what, disable=self.rank > 0, mininterval=1, leave=False)

    def told(self, value: Callable[[], T]) -> T:
        """`value()` of rank 0, JSON, on every rank; only rank 0 calls it."""
        if self.world_size == 1:
            return value()
        file = self.exchange / "told.json"
        if self.rank == 0:
            write_whole(file, json.dumps(value()))
        self.barrier()
        found = read_json(file)
        self.barrier()
        if self.rank == 0:
            file.unlink()
        return found

    def gather(self, found: dict[int, ImageCheck], n: int) -> list[ImageCheck]:
        """All-gather of the checks by image index, through files in `exchange`. Every rank gets the list of all n."""
        if self.world_size > 1:
            files = [self.exchange / f"seen-{rank}.json" for rank in range(self.world_size)]
            write_whole(files[self.rank], json.dumps(list(found.items())))
            self.barrier()
            if missing := [file.name for file in files if not file.exists()]:
                raise FileNotFoundError(
                    f"'{self.exchange}' lacks {', '.join(missing)} of the other processes; 'run.folder' must be one "
                    "folder that all of them share"
                )
            found = {i: ImageCheck(*check) for file in files for i, check in read_json(file)}
            self.barrier()
            files[self.rank].unlink()
        return [found[i] for i in range(n)]


def check_images(images: Sequence[ImageRef], size: int | Size, workers: Workers) -> list[ImageCheck]:
    """Read and decode every image once, divided among the ranks. Pixels are discarded; only the checks are kept."""
    chunks = workers.chunks(len(images), SHARD)
    mine = [i for chunk in chunks for i in chunk]
    checks = prefetch((images[i] for i in mine), lambda ref: check_image(ref, size).check, processes=workers.world_size)
    found = {}
    with closing(checks), workers.progress_bar(chunks, "check images") as bar:
        for i, check in zip(mine, checks, strict=True):
            found[i] = check
            bar.update()
    return workers.gather(found, len(images))
