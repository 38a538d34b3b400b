"""Image files: finding them in a stable order, and reading them."""

from __future__ import annotations

import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")

# What Pillow raises for damaged files: its own errors are OSErrors, its readers let the others through.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageError(ValueError):
    """An image file that cannot be scored. The message is the reason, without the file's name."""


def find_images(folder: Path) -> list[str]:
    """Every image below a folder: paths relative to it with `/`, in natural order (2.png before 10.png).

    Goes by the suffix. Files and folders whose names begin with a dot are left out, linked folders not entered.
    """
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(here).relative_to(folder)
        found += [(inside / f).as_posix() for f in files if f.lower().endswith(SUFFIXES) and not f.startswith(".")]
    return sorted(found, key=_natural)


def _natural(path: str) -> tuple[list[list[str | int]], str]:
    parts = [re.split(r"([0-9]+)", part) for part in path.split("/")]
    return [[int(x) if i % 2 else x for i, x in enumerate(part)] for part in parts], path


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """An image file -> uint8 [3, H, W], upright. Divide by 255, best on the device, before scoring it.

    Palettes and grey become RGB; what is transparent is shown over white; orientation tags are applied; of an animation
    the first frame is taken. Raises ImageError with the reason for files that are missing or damaged and for more than
    8 bits a channel, which Pillow would clip.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return to_tensor(image)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError("not an image that Pillow can read") from error
    except _DAMAGE as error:
        raise ImageError(f"damaged: {error or type(error).__name__}") from error


def to_tensor(image: Image.Image) -> Tensor:
    """A Pillow image -> uint8 [3, H, W], by the rules of `read_image`. Raises ImageError."""
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as RGB, upright, what is transparent over white. Raises ImageError for over 8 bits a channel."""
    if image.mode.startswith(("I", "F")):
        raise ImageError(f"mode {image.mode} has more than 8 bits a channel; save it with 8")
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return upright.convert("RGB")
