"""Aspect-ratio buckets: sizes, crops, pairs and groups of several shapes, the cache."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffalign.data import Balanced, KeyedLoader, LikedImages, PreferencePairs, RankedImages, TargetImages, UserPairs
from diffalign.data.buckets import bucket_sizes, cropped_share, describe_buckets
from diffalign.data.images import cropped
from diffalign.draws import Draws
from diffalign.types import Cond

SHAPES = [(90, 90 + 4 * k) for k in range(20)] + [(94 + 4 * k, 90) for k in range(20)]


class Pool:
    """Encoder of factor 4: latents are means of 4 x 4 pixels."""

    fingerprint = "pool"

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def encode_pixels(self, pixels):
        self.seen.append(tuple(pixels.shape[2:]))
        return torch.nn.functional.avg_pool2d(pixels, 4)

    def encode_text(self, prompts):
        return Cond(torch.tensor([[[float(len(p))]] for p in prompts]))


def ramp(height: int, width: int, blue: int = 0) -> Image.Image:
    """Red grows to the right and green downwards, both from 0 to 1 over the whole image."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * (x + 0.5) / width, 255 * (y + 0.5) / height, np.full_like(x, blue)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize(("resolution", "step"), [(1024, 64), (512, 32), (512, 16), (1024, 8)])
def test_buckets_have_at_most_the_squares_pixels_and_crop_little_of_every_shape(resolution: int, step: int) -> None:
    sizes = bucket_sizes(resolution, step, 2.0)
    assert sizes[0] == (resolution, resolution) and len({*sizes}) == len(sizes)
    assert {(w, h) for h, w in sizes} == {*sizes}
    for height, width in sizes:
        assert height % step == width % step == 0 and max(height, width) <= 2 * min(height, width)
        assert 0.85 * resolution**2 <= height * width <= resolution**2
    for height in range(1000, 2001, 7):
        for shape in ((height, 1000), (1000, height), (2 * height, 4000 - 2 * 1000 + 7)):
            if 0.5 <= shape[0] / shape[1] <= 2:
                assert min(cropped_share(shape, size) for size in sizes) <= 0.05, shape


def test_one_size_without_buckets() -> None:
    assert bucket_sizes(512, None, 2.0) == [(512, 512)]
    assert bucket_sizes(512, 32, 1.0) == [(512, 512)]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """200 images of 40 shapes as 100 pairs of two images of one shape, and their data set."""
    folder = tmp_path_factory.mktemp("many")
    lines = []
    for k in range(100):
        for n, side in enumerate("wl"):
            ramp(*SHAPES[k % 40], blue=2 * k + n).save(folder / f"{k}{side}.png", compress_level=1)
        lines.append(json.dumps({"prompt": "x" * (k + 1), "chosen": f"{k}w.png", "rejected": f"{k}l.png"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder, pairs_of(folder, folder / "pairs.jsonl")


def pairs_of(root: Path, path: Path, kind: Any = PreferencePairs, encoder: Any = None, **settings: Any) -> Any:
    settings = {"resolution": 64, "buckets": 4, "cache": str(root / "cache"), "batch_size": 4} | settings
    return kind(encoder or Pool(), Draws(0), root / "run", path=str(path), **settings)


def micro_batches(data: Any, n: int, rank: int = 0, world_size: int = 1, first: int = 0) -> list[Any]:
    options: dict[str, Any] = {"batch_size": data.batch_size, "device": torch.device("cpu")}
    loader = KeyedLoader(data, Draws(0), rank=rank, world_size=world_size, **options)
    return [*itertools.islice(loader.start(first), n)]


def test_none_of_200_images_of_40_shapes_is_stretched_or_cropped_by_more_than_a_twentieth(many: Any) -> None:
    """The slopes of both ramps, in original pixels, are equal to within the rounding of a side to whole pixels."""
    folder, pairs = many
    assert len(SHAPES) == len({*SHAPES}) == 40 and len(pairs) == 100 and len(pairs.images) == 200
    assert not (folder / "run/dropped.jsonl").read_text()
    assert len({*pairs.buckets.tolist()}) > 20
    for i in range(len(pairs)):
        item = pairs[0, i]
        for x, size in zip(item.x, item.size.int().tolist(), strict=True):
            height, width, target = size[0], size[1], size[4:]
            assert (height, width) == SHAPES[int(pairs.ids[i].split(":")[1].split("#")[0]) % 40 - 1]
            assert tuple(target) == pairs.sizes[pairs.buckets[i]] == tuple(4 * n for n in x.shape[1:])
            across = (x[0, :, -1] - x[0, :, 0]).mean() * width / (target[1] - 4)
            down = (x[1, -1] - x[1, 0]).mean() * height / (target[0] - 4)
            assert abs(across / down - 1) < 1.5 / min(target) + 0.01
            kept = (across * target[1] / width * down * target[0] / height).item()
            assert cropped_share((height, width), tuple(target)) <= 0.05 and kept > 0.94
            middle = x.mean((1, 2))[:2]
            assert (middle - 0.5).abs().max() < 0.02  # the centre


def test_two_processes_see_the_order_of_one_and_resuming_is_exact(many: Any) -> None:
    _, pairs = many
    one = micro_batches(pairs, 60)
    for world_size in (2, 3):
        ranks = [micro_batches(pairs, 60 // world_size, rank, world_size) for rank in range(world_size)]
        for a, b in zip(one, itertools.chain(*zip(*ranks, strict=True)), strict=True):
            assert a.keys == b.keys and torch.equal(a.x0, b.x0) and torch.equal(a.size, b.size)
    for first in (1, 7, 25, 26, 51):
        for a, b in zip(one[first : first + 9], micro_batches(pairs, 9, first=first), strict=False):
            assert a.keys == b.keys and torch.equal(a.x0, b.x0)
    assert len({batch.x0.shape for batch in one}) > 10
    assert [batch.keys for batch in one] != [batch.keys for batch in micro_batches(pairs, 60, first=60)]


def test_every_pair_occurs_once_in_each_epoch_however_few_a_bucket_has(many: Any) -> None:
    """Samples that do not fill a micro-batch come first in the next epoch: none is lost or taken twice."""
    _, pairs = many
    counts = Counter(pairs.buckets.tolist())
    assert min(counts.values()) < 4 < max(counts.values()) and any(n % 4 for n in counts.values())
    order = KeyedLoader(pairs, Draws(0), batch_size=4, device=torch.device("cpu")).order
    epochs, seen = 40, Counter()
    for number in range(epochs * 100 // 4):
        bucket, k = order.at(number)
        found = order.samples(bucket, k)
        assert {pairs.buckets[i] for _, i in found} == {bucket}
        seen.update(found)
    assert set(seen.values()) == {1}
    waiting = [(e, i) for e in range(epochs) for i in range(100) if (e, i) not in seen]
    assert len(waiting) <= 3 * len(counts)
    number = 10**12 + 1  # far away, and at once
    bucket, k = order.at(number)
    assert {pairs.buckets[i] for _, i in order.samples(bucket, k)} == {bucket}


@pytest.mark.parametrize("world_size", [1, 3])
def test_one_pass_takes_every_draw_of_every_image_once_in_the_batches_of_training(many: Any, world_size: int) -> None:
    _, pairs = many
    pairs.draws_per_sample = 2
    try:
        options: dict[str, Any] = {"batch_size": 4, "device": torch.device("cpu"), "world_size": world_size}
        loaders = [KeyedLoader(pairs, Draws(0), rank=rank, **options) for rank in range(world_size)]
        passes = [[*loader.once()] for loader in loaders]
        trained = {tuple(batch.keys) for batch in micro_batches(pairs, 2 * 4 * 50)}
    finally:
        pairs.draws_per_sample = None
    assert len({len(batches) for batches in passes}) == 1
    every = [batch for batches in passes for batch in batches]
    kept = [
        (key[0], place) for b in every for place, (key, _) in zip(b.places, b.sample_keys, strict=True) if place >= 0
    ]
    assert len(kept) == len({*kept}) == 2 * pairs.places == 400
    assert all(tuple(batch.keys) in trained for batch in every if min(batch.places) >= 0)


def test_a_square_only_set_has_the_batches_of_one_without_buckets(tmp_path: Path) -> None:
    lines = []
    for k in range(7):
        for n, side in enumerate("wl"):
            ramp(70 + k, 70 + k, blue=2 * k + n).save(tmp_path / f"{k}{side}.png")
        lines.append(json.dumps({"prompt": "x" * (k + 1), "chosen": f"{k}w.png", "rejected": f"{k}l.png"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    both = []
    for buckets in (4, None):
        for options in ({"hflip": True}, {"size_conditions": "square"}):
            pairs = pairs_of(tmp_path, tmp_path / "pairs.jsonl", buckets=buckets, batch_size=2, **options)
            both.append([(b.keys, b.x0.tolist(), b.size.tolist(), b.places) for b in micro_batches(pairs, 12)])
    assert both[:2] == both[2:]


def mixed(folder: Path) -> Path:
    """Pairs of one shape, of two near ones, of two far ones; an image that is in pairs of two buckets; a long image."""
    shapes = {"a": (80, 60), "b": (60, 80), "c": (80, 61), "d": (80, 63), "e": (70, 70), "f": (20, 200), "g": (66, 70)}
    folder.mkdir()
    for k, (name, (height, width)) in enumerate(shapes.items()):
        ramp(height, width, blue=20 * k).save(folder / f"{name}.png")
        ramp(height, width, blue=20 * k + 9).save(folder / f"{name}{name}.png")
    pairs = ["a aa", "b bb", "c d", "a b", "e ee", "e g", "f ff", "a d"]
    lines = [dict(zip(("chosen", "rejected"), (f"{name}.png" for name in pair.split()), strict=True)) for pair in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({"prompt": "x", **line}) for line in lines))
    return folder / "pairs.jsonl"


def test_a_pair_of_two_shapes_goes_to_the_bucket_of_their_mean_or_is_listed(tmp_path: Path, caplog: Any) -> None:
    path = mixed(tmp_path / "data")
    pairs = pairs_of(tmp_path, path, max_dropped=0.5)
    found = {id.split(":")[1].split("#")[0]: pairs.sizes[b] for id, b in zip(pairs.ids, pairs.buckets, strict=True)}
    assert found["1"] == found["3"] == found["8"] == (72, 56) and found["2"] == (56, 72)
    assert found["5"] == (64, 64) and found["6"] == (64, 64)
    dropped = {row["id"]: row["reason"] for row in map(json.loads, (tmp_path / "run/dropped.jsonl").open())}
    assert dropped == {
        "pairs.jsonl:4#0-1": "no bucket: 64 x 64 would crop 24.7% of 80 x 60 and 60 x 80 pixels",
        "pairs.jsonl:7#0-1": "no bucket: 88 x 44 would crop 80.0% of 200 x 20 pixels",
    }
    assert "dropped 2 (2 no bucket)" in caplog.text
    said = describe_buckets(pairs.sizes, pairs.buckets)
    assert said == "examples by width and height: 64 x 64: 2, 72 x 56: 1, 56 x 72: 3"
    assert len(pairs.images) == 9 and sum(ref.path.endswith("/e.png") for ref in pairs.images) == 1
    with pytest.raises(ValueError, match=r"2 of 8 records of .* cannot be used, more than .* \(2 no bucket\)"):
        pairs_of(tmp_path, path)


def test_an_image_in_two_buckets_is_cropped_for_each(tmp_path: Path) -> None:
    ramp(64, 64).save(tmp_path / "square.png")
    ramp(60, 64, 7).save(tmp_path / "other.png")
    ramp(64, 64, 7).save(tmp_path / "equal.png")
    rows = [("square", "equal"), ("square", "other")]
    lines = [json.dumps({"prompt": "x", "chosen": f"{w}.png", "rejected": f"{loser}.png"}) for w, loser in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    pairs = pairs_of(tmp_path, tmp_path / "pairs.jsonl", hflip=True, buckets=2)
    for i, names in enumerate(rows):
        for epoch in range(4):
            item = pairs[epoch, i]
            flipped = Draws(0).uniform([item.key], stream="hflip").item() < 0.5
            for name, x, size in zip(names, item.x, item.size, strict=True):
                crop = cropped((tmp_path / f"{name}.png").read_bytes(), pairs.sizes[pairs.buckets[i]])
                crop = crop.mirrored() if flipped else crop
                torch.testing.assert_close(x, Pool().encode_pixels(crop.pixels[None])[0], atol=1e-3, rtol=0)
                assert torch.equal(size, crop.size)
    assert [pairs.sizes[b] for b in pairs.buckets] == [(64, 64), (62, 64)]
    assert [Path(ref.path).stem for ref in pairs.images] == ["square", "equal", "square", "other"]


def test_a_second_start_encodes_nothing_and_caches_are_keyed_by_the_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffalign.data.content_index.SETTLED", 0)
    monkeypatch.setattr("diffalign.data.content_index.COARSE", 0)
    path, seen = mixed(tmp_path / "data"), []
    for k, settings in enumerate(({}, {}, {"max_aspect": 1.1}, {"buckets": 8}, {"buckets": None}, {"max_aspect": 1.1})):
        encoder = Pool()
        pairs = pairs_of(tmp_path, path, encoder=encoder, max_dropped=0.9, **settings)
        seen.append(encoder.seen)
        assert all(list(pairs[0, i].x.shape[2:]) for i in range(len(pairs))), k
    assert {*seen[0]} == {(64, 64), (72, 56), (56, 72)} and seen[1] == seen[5] == []
    assert {*seen[2]} <= {(60, 64)} and {*seen[4]} == {(64, 64)}
    names = {p.name.split("-center")[0] for p in (tmp_path / "cache/pool").iterdir()}
    assert {"squares-64", "crops-56x72", "crops-72x56"} <= names


def test_mirrored_crops_have_the_size_conditions_of_the_mirrored_image() -> None:
    """61 x 40 at 48 x 40 (width x height): the image becomes 61 x 40, of which 13 columns are cropped."""
    stream = io.BytesIO()
    ramp(40, 61).save(stream, "PNG")
    crop = cropped(stream.getvalue(), (40, 48))
    assert crop.size.tolist() == [40, 61, 0, 6, 40, 48]
    assert crop.mirrored().size.tolist() == [40, 61, 0, 7, 40, 48]
    tall = cropped(stream.getvalue(), (48, 40))
    assert tall.size.tolist() == [40, 61, 0, 16, 48, 40] and tall.pixels.shape == (3, 48, 40)


def test_ranked_groups_liked_images_and_captioned_images(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    path = mixed(folder)
    groups = [{"images": ["a.png", "c.png", "d.png"]}, {"images": ["a.png", "aa.png", "b.png"]}]
    lines = [json.dumps({"prompt": "x", "ranking": [1, 2, 3], **group}) for group in groups]
    (folder / "ranked").mkdir()
    (folder / "ranked/ranked.jsonl").write_text("\n".join(lines))
    for image in folder.glob("*.png"):
        (folder / "ranked" / image.name).write_bytes(image.read_bytes())
    ranked = pairs_of(tmp_path, folder / "ranked/ranked.jsonl", RankedImages, max_dropped=0.5)
    assert ranked.ids == ["ranked.jsonl:1"] and ranked[0, 0].x.shape == (3, 3, 18, 14)
    assert "no bucket" in (tmp_path / "run/dropped.jsonl").read_text()
    liked = pairs_of(tmp_path, path, LikedImages, max_dropped=0.5)
    balanced = Balanced(liked, Draws(0))
    drawn = [(epoch, slot) for epoch in range(30) for slot in range(len(balanced))]
    for place in drawn:
        assert tuple(4 * n for n in balanced[place].x.shape[2:]) == liked.sizes[balanced.buckets[place[1]]]
    assert len({batch.x0.shape for batch in micro_batches(balanced, 20)}) > 2
    (folder / "prompt.txt").write_text("a ramp")
    targets = pairs_of(tmp_path, folder, TargetImages, max_dropped=0.5)
    assert len(targets) == 12 and len({batch.x0.shape for batch in micro_batches(targets, 9)}) > 2


def test_images_far_from_the_only_bucket_are_dropped(tmp_path: Path) -> None:
    pairs = pairs_of(tmp_path, mixed(tmp_path / "data"), max_aspect=1.0, max_dropped=0.9)
    assert pairs.ids == ["pairs.jsonl:5#0-1", "pairs.jsonl:6#0-1"] and pairs.buckets.tolist() == [0, 0]


def test_pairs_of_users_keep_their_buckets(tmp_path: Path) -> None:
    path = mixed(tmp_path / "data")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    named = [json.dumps({**line, "annotator": "ab"[k % 2]}) for k, line in enumerate(lines)]
    path.write_text("\n".join(named))
    pairs = pairs_of(tmp_path, path, max_dropped=0.5)
    save_file({"b": torch.zeros(1, 1, 4)}, tmp_path / "users.safetensors")
    users = UserPairs(pairs, Draws(0), path=str(tmp_path / "users.safetensors"))
    assert len(users) == 3 and len({*users.buckets.tolist()}) > 1
    for i, bucket in enumerate(users.buckets):
        assert tuple(4 * n for n in users[0, i].x.shape[2:]) == pairs.sizes[bucket]


def test_invalid_settings_are_reported(tmp_path: Path) -> None:
    path = mixed(tmp_path / "data")
    for settings, said in (
        ({"buckets": 5}, r"'data.buckets' = 5 must divide 'data.resolution' = 64"),
        ({"buckets": 0}, r"'data.buckets' = 0 must divide"),
        ({"max_aspect": 0.5}, r"'data.max_aspect' = 0.5 must be 1 or more"),
        ({"cache": "off"}, r"'data.buckets' needs the cache"),
    ):
        with pytest.raises(ValueError, match=said):
            pairs_of(tmp_path, path, **settings)
