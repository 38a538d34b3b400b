"""Decoding images to square crops, and prefetching many of them in threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.data.records import ImageRef, clear_read_caches
from reward_models.images import ImageError, UnsupportedImage, decode

T = TypeVar("T")

MAX_ASPECT = 32
"""Largest aspect ratio. Resizing the shorter side of a longer strip would need gigabytes."""


class Square(NamedTuple):
    """Square crop of an image: pixels [3, R, R] in [0, 1], and its size conditions [6] as in LatentBatch."""

    pixels: Tensor
    size: Tensor

    def mirrored(self) -> Square:
        """The same crop of the mirrored image."""
        height, width, _, left, resolution, _ = self.size.tolist()
        resized = int(resolution * width / min(height, width))
        size = self.size.clone()
        size[3] = resized - resolution - left
        return Square(self.pixels.flip(-1), size)


def square(data: bytes, resolution: int, *, at: float = 0.5) -> Square:
    """Decode an image, resize it and crop a square of `resolution` pixels.

    The shorter side is resized to `resolution` (bilinear, antialiased). The longer side is cropped at `at`: 0 is left
    or top, 0.5 the centre, 1 right or bottom. At 0.5 this equals torchvision's Resize and CenterCrop, which round the
    longer side down. Raises ValueError with the reason when the image is damaged or not supported.
    """
    try:
        image = decode(data)
    except ImageError as error:
        kind = "unsupported" if isinstance(error, UnsupportedImage) else "corrupt"
        raise ValueError(f"{kind} image: {str(error).removeprefix('damaged: ')}") from error
    original = (image.height, image.width)
    short, long = sorted(image.size)
    if long > MAX_ASPECT * short:
        raise ValueError(f"unsupported image: {image.width} x {image.height} pixels is more than {MAX_ASPECT}:1")
    width, height = (int(resolution * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (round((side - resolution) * at) for side in (width, height))
    image = image.crop((left, top, left + resolution, top + resolution))
    size = torch.tensor([*original, top, left, resolution, resolution], dtype=torch.float32)
    return Square(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255, size)


def prefetch(
    images: Iterable[ImageRef], load: Callable[[ImageRef], T], *, processes: int = 1
) -> Generator[T, None, None]:
    """`load(image)` for every image, in order, computed ahead in threads up to a bound.

    processes is the number of processes that share the machine's cores. Threads suffice: Pillow and hashlib release
    the GIL.
    """
    threads = max(2, min(16, (os.cpu_count() or 1) // processes))
    waiting: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for ref in images:
                waiting.append(pool.submit(load, ref))
                if len(waiting) > 4 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            clear_read_caches()
