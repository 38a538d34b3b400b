"""Image files: finding them in a stable order, and reading them."""

from __future__ import annotations

import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
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


def _natural(path: str) -> tuple[str, str]:
    """Sorts by folder, then text, then number: these as their length and digits, after the end of a folder's name and
    before all text. A text, because lists of parts would take 500 bytes a name."""
    key = re.sub("[0-9]+", lambda m: _number(m[0].lstrip("0")), path)
    return key.replace("/", "\0"), path


def _number(digits: str) -> str:
    return f"\1{chr(len(digits) + 1)}{digits}"


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """An image file -> uint8 [3, H, W], upright, as `read_rgb` reads it. Divide by 255, best on the device, before
    scoring it. Raises ImageError."""
    return _tensor(read_rgb(path))


def read_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """An image file -> Pillow image of mode RGB, upright.

    Palettes and grey become RGB; what is transparent is shown over white; orientation tags are applied; of an animation
    the first frame is taken. Raises ImageError with the reason for files that are missing or damaged and for more than
    8 bits a channel, which Pillow would clip.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
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
    return _tensor(to_rgb(image))


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as RGB, upright, what is transparent over white. Raises ImageError for over 8 bits a channel."""
    if image.mode.startswith(("I", "F")):
        raise ImageError(f"mode {image.mode} has more than 8 bits a channel; save it with 8")
    # Neither turned nor converted where there is nothing to do: both copy the whole image, a third of the time.
    upright = ImageOps.exif_transpose(image) if image.getexif().get(ExifTags.Base.Orientation, 1) != 1 else image
    if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return upright if upright.mode == "RGB" else upright.convert("RGB")
