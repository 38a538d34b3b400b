"""Bytes to square pixels."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from diffalign.data.images import square


def encoded(array, format="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format, **options)
    return stream.getvalue()


def noise(height, width, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("size", [(40, 61), (61, 40), (16, 16), (9, 12)])
def test_the_shorter_side_is_resized_and_the_centre_kept_as_torchvision_does(size):
    image = noise(*size)
    height, width = (16 * max(1, size[0] / size[1]), 16 * max(1, size[1] / size[0]))
    resize = v2.Resize([round(height), round(width)], antialias=True)  # PIL input: Pillow's own bilinear
    expected = v2.functional.pil_to_tensor(v2.CenterCrop(16)(resize(Image.fromarray(image)))) / 255
    torch.testing.assert_close(square(encoded(image), 16).pixels, expected, rtol=0, atol=0)


@pytest.mark.parametrize("at, left", [(0.0, 0), (0.25, 4), (0.5, 8), (1.0, 16)])
def test_where_the_longer_side_is_cropped(at, left):
    image = noise(16, 32)
    expected = torch.from_numpy(image[:, left : left + 16]).permute(2, 0, 1) / 255
    torch.testing.assert_close(square(encoded(image), 16, at=at).pixels, expected)
    torch.testing.assert_close(square(encoded(image), 16, at=at).mirrored().pixels, expected.flip(-1))
    tall = square(encoded(np.ascontiguousarray(image.transpose(1, 0, 2))), 16, at=at).pixels
    torch.testing.assert_close(tall, expected.transpose(1, 2))


def test_grey_palette_and_transparent_images_become_rgb():
    grey = square(encoded(noise(16, 16, 1)), 16).pixels
    assert grey.shape == (3, 16, 16) and grey.dtype == torch.float32
    assert torch.equal(grey[0], grey[2])
    assert square(encoded(noise(16, 16, 4)), 16).pixels.shape == (3, 16, 16)


def test_orientation_is_that_which_people_saw():
    """EXIF orientation 3 means: turn by 180 degrees to view."""
    image, exif = noise(16, 16), Image.Exif()
    exif[0x0112] = 3
    turned = square(encoded(np.ascontiguousarray(image[::-1, ::-1]), exif=exif), 16).pixels
    torch.testing.assert_close(turned, square(encoded(image), 16).pixels)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_truncated_and_damaged_images_are_refused(format):
    data = encoded(noise(64, 64), format)
    for broken in (data[: len(data) // 2], data[:20], b"", b"not an image"):
        with pytest.raises(ValueError, match="corrupt image: "):
            square(broken, 16)


def test_every_flipped_byte_gives_an_image_or_a_value_error():
    data = bytearray(encoded(noise(16, 16)))
    refused = 0
    for position in range(0, len(data), 7):
        broken = bytes(data[:position]) + bytes([data[position] ^ 0xFF]) + bytes(data[position + 1 :])
        try:
            assert square(broken, 16).pixels.shape == (3, 16, 16)
        except ValueError:
            refused += 1
    assert refused > 10


def test_strips_and_images_of_more_than_8_bits_are_refused():
    with pytest.raises(ValueError, match=r"unsupported image: 4000 x 2 pixels"):
        square(encoded(noise(2, 4000)), 16)
    with pytest.raises(ValueError, match=r"unsupported image: mode I(;16)? has more"):
        square(encoded(noise(16, 16, 1).astype(np.uint16) * 256), 16)
