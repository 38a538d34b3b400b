"""Random crop and flip: drawn once per pair, from its key."""

import json

import numpy as np
import torch
from PIL import Image

from diffalign.data import PreferencePairs
from diffalign.draws import Draws
from diffalign.types import Cond


class Pool:
    """Encoder: latents are the pixels averaged to 2 x 2."""

    fingerprint = "pool"

    def encode_pixels(self, pixels):
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 2)

    def encode_text(self, prompts):
        return Cond(torch.zeros(len(prompts), 2, 3))


def pairs_of(tmp_path, path, **config):
    config = {"resolution": 8, "hflip": True, "cache": str(tmp_path / "cache")} | config
    return PreferencePairs(Pool(), Draws(0), tmp_path / "run", path=path, **config)


def gradients(folder):
    """One pair of 16 x 8 images whose red is 10 times the column index; the loser's columns start at 1."""
    folder.mkdir()
    for side, start in (("w", 0), ("l", 1)):
        array = np.zeros((8, 16, 3), dtype=np.uint8)
        array[:, :, 0] = 10 * (np.arange(16) + start)
        array[:, :, 2] = 200 if side == "w" else 100
        Image.fromarray(array).save(folder / f"{side}.png")
    line = {"prompt": "picture 1", "chosen": "w.png", "rejected": "l.png", "prob": 0.75}
    (folder / "pairs.jsonl").write_text(json.dumps(line))
    return str(folder / "pairs.jsonl")


def test_crop_and_flip_are_drawn_once_per_pair_from_its_key(tmp_path):
    """Column c of a crop at u is image column round(8 u) + c, in winner and loser; a flip reverses the columns."""
    pairs = pairs_of(tmp_path, gradients(tmp_path / "data"), cache="off", crop="random")
    draws, flips = Draws(0), set()
    for epoch in range(12):
        item = pairs[epoch, 0]
        key = (epoch, "pairs.jsonl:1#0-1")
        assert item.key == key
        left = round(8 * draws.uniform([key], stream="crop").item())
        flipped = draws.uniform([key], stream="hflip").item() < 0.5
        for x, start in ((item.x[0], 0), (item.x[1], 1)):
            columns = [round(v * 25.5) - start for v in x[0, 0].tolist()]
            assert columns == list(range(left, left + 8))[:: -1 if flipped else 1]
        flips.add((left, flipped))
    assert len(flips) > 5


def test_flips_from_the_cache_equal_flips_from_pixels(tmp_path):
    path = gradients(tmp_path / "data")
    cached = pairs_of(tmp_path, path)
    fresh = pairs_of(tmp_path, path, cache="off")
    for epoch in range(8):
        a, b = (p.encode(p.collate([p[epoch, 0]])) for p in (cached, fresh))
        torch.testing.assert_close(a.x0, b.x0, rtol=1e-3, atol=0)
        assert (a.keys, a.flip) == (b.keys, b.flip)
    assert len({cached[e, 0].x[0, 0, 0, 0].item() for e in range(8)}) == 2
