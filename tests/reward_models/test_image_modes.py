"""Decoding of palettes, grey, transparency, 16 bits and orientation tags, as in docs/preprocessing.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reward_models.images import ImageError, read_image, read_rgb, to_tensor


def _pixel(image: Image.Image) -> list[int]:
    return to_tensor(image)[:, 0, 0].tolist()


def test_transparent_images_are_composited_over_white() -> None:
    """Half-transparent (alpha 128) red over white: 255 * 128/255 + 255 * 127/255 = 255 and 127 in the others."""
    assert _pixel(Image.new("RGBA", (2, 2), (255, 0, 0, 128))) == [255, 127, 127]
    assert _pixel(Image.new("RGBA", (2, 2), (9, 8, 7, 0))) == [255, 255, 255]
    assert _pixel(Image.new("RGBA", (2, 2), (9, 8, 7, 255))) == [9, 8, 7]
    assert _pixel(Image.new("LA", (2, 2), (0, 128))) == [127, 127, 127]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert _pixel(palette) == [10, 20, 30]
    palette.info["transparency"] = 1
    assert _pixel(palette) == [255, 255, 255]


def test_grey_one_bit_and_print_colours_become_rgb() -> None:
    assert _pixel(Image.new("L", (2, 2), 77)) == [77, 77, 77]
    assert _pixel(Image.new("1", (2, 2), 1)) == [255, 255, 255]
    assert _pixel(Image.new("CMYK", (2, 2), (0, 255, 255, 0))) == [255, 0, 0]


def test_more_than_8_bits_are_refused_and_not_clipped(tmp_path: Path) -> None:
    """Pillow's own conversion would turn every 16-bit grey above 255 white."""
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ImageError, match="more than 8 bits per channel; save it with 8 bits"):
        read_image(tmp_path / "deep.png")


def test_orientation_tags_are_applied(tmp_path: Path) -> None:
    """Tag 6: an upright photograph stored on its side. 3 high and 5 wide becomes 5 high and 3 wide."""
    lying = Image.fromarray(np.arange(45, dtype=np.uint8).reshape(3, 5, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "lying.png", exif=exif)
    upright = read_image(tmp_path / "lying.png")
    assert upright.shape == (3, 5, 3)
    assert torch.equal(upright, torch.from_numpy(np.rot90(np.asarray(lying), k=-1).copy()).permute(2, 0, 1))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif"])
def test_an_image_can_be_resized_after_its_file_is_closed(suffix: str, tmp_path: Path) -> None:
    """Pillow reads lazily, and `read_rgb` does not copy an image that is RGB already."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    image.save(tmp_path / f"x.{suffix}")
    read = read_rgb(tmp_path / f"x.{suffix}")
    (tmp_path / f"x.{suffix}").unlink()
    assert read.mode == "RGB" and torch.equal(to_tensor(read.resize((30, 20))), to_tensor(read))
