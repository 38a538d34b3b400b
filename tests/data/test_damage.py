"""Damaged records are listed one by one with file, line, side and reason; the others are used unchanged."""

import io
import json
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, features

from diffalign.data import Dropped, PreferencePairs, Record, read_records
from diffalign.data.entry_checks import bad_label
from diffalign.data.image_folder import read_targets
from diffalign.draws import Draws
from diffalign.types import Cond
from reward_models.images import decode

CASES = Path(__file__).parent / "cases"


class Pool:
    """Encoder: latents are the pixels averaged to 2 x 2, an embedding is the prompt length."""

    fingerprint = "pool"

    def encode_pixels(self, pixels):
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 2)

    def encode_text(self, prompts):
        return Cond(torch.tensor([[[float(len(p))]] for p in prompts]))


def png(n, mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, (8, 8), (n, 0, 7)).save(stream, "PNG")
    return stream.getvalue()


def good(folder, n=3):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(2 * n):
        (folder / f"{k}.png").write_bytes(png(k))
    return [{"prompt": f"p {k}", "chosen": f"{2 * k}.png", "rejected": f"{2 * k + 1}.png"} for k in range(n)]


def build(path, run, **config):
    return PreferencePairs(Pool(), Draws(0), run, path=str(path), resolution=8, cache="off", max_dropped=1.0, **config)


def listed(run):
    return [json.loads(line) for line in (run / "dropped.jsonl").read_text().splitlines()]


LINES = {
    "NUL in a path": (
        '{"prompt": "x", "chosen": "a\\u0000b.png", "rejected": "0.png"}',
        "bad path: it contains a NUL character",
        0,
    ),
    "half a character": (
        '{"prompt": "x", "chosen": "0.png", "rejected": "\\ud83d.png"}',
        "bad path: it is not valid",
        1,
    ),
    "deep JSON": ("[" * 20_000, "bad line: not readable JSON: nested too deeply", None),
    "deep JSON inside": (
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "bad line: not readable JSON: nested",
        None,
    ),
    "a label of 400 digits": (
        '{"prompt": "x", "chosen": "0.png", "rejected": "1.png", "prob": 1' + "0" * 400 + "}",
        "label out of range: 1000",
        None,
    ),
    "scores of 400 digits": (
        '{"prompt": "x", "chosen": "0.png", "rejected": "1.png", "scores": [1, 1' + "0" * 400 + "]}",
        "label out of range: 1000",
        None,
    ),
    "a number of 5000 digits": (
        '{"prompt": "x", "n": ' + "1" * 5000 + "}",
        "bad line: not readable JSON: a",
        None,
    ),
    "a name of 300 characters": (
        json.dumps({"prompt": "x", "chosen": "x" * 300, "rejected": "0.png"}),
        "unreadable image: File name too long",
        0,
    ),
    "a folder": (json.dumps({"prompt": "x", "chosen": "0.png", "rejected": "."}), "unreadable image: a folder, a", 1),
    "a pipe": (
        json.dumps({"prompt": "x", "chosen": "pipe.png", "rejected": "0.png"}),
        "unreadable image: a folder, a",
        0,
    ),
    "a device": (json.dumps({"prompt": "x", "chosen": "0.png", "rejected": "/dev/zero"}), "unreadable image: a fol", 1),
    "damaged EXIF": (
        json.dumps({"prompt": "x", "chosen": "exif_type_error.jpg", "rejected": "0.png"}),
        "corrupt image",
        0,
    ),
    "damaged AVIF": (
        json.dumps({"prompt": "x", "chosen": "0.png", "rejected": "damaged.avif"}),
        "corrupt image" if features.check("avif") else "unsupported image: AVIF is supported only by",
        1,
    ),
    "nothing there": (json.dumps({"prompt": "x", "chosen": "0.png", "rejected": "gone.png"}), "missing image", 1),
    "another encoding": (
        '{"prompt": "é", "chosen": "0.png", "rejected": "1.png"}'.encode("latin-1"),
        "bad line: not UTF-8",
        None,
    ),
    "an annotator that is a list": (
        json.dumps({"prompt": "x", "chosen": "0.png", "rejected": "1.png", "annotator": [1]}),
        "bad annotator: [1]",
        None,
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_a_damaged_line_is_dropped_alone(tmp_path, case):
    text, reason, side = LINES[case]
    rows = [json.dumps(row).encode() for row in good(tmp_path)]
    for file in CASES.iterdir():
        shutil.copy(file, tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    text = text.encode() if isinstance(text, str) else text
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join([*rows[:2], text, *rows[2:]]))
    start = time.monotonic()
    pairs = build(tmp_path / "pairs.jsonl", tmp_path / "run")
    assert time.monotonic() - start < 5
    assert pairs.ids == [f"pairs.jsonl:{k}#0-1" for k in (1, 2, 4)]
    (line,) = listed(tmp_path / "run")
    assert line["id"] == "pairs.jsonl:3" and line["reason"].startswith(reason)
    assert line.get("side") == (None if side is None else ("chosen", "rejected")[side])
    assert len(json.dumps(line)) < 700 and not re.search("0x[0-9a-f]{6}", line["reason"])


def test_text_in_an_image_column_raises_with_the_column(tmp_path):
    rows = {"caption": ["a"], "jpg_0": [png(0)], "jpg_1": [png(1)], "label_0": [1.0]}
    for values in (["a.png"], [3], [{"path": "a.png"}], [{"bytes": "a"}]):
        pq.write_table(pa.table(rows | {"jpg_1": values}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=r"column 'jpg_1' of '.*a\.parquet' contains .* instead of encoded images"):
            list(read_records(tmp_path / "a.parquet"))
    for values in (
        pa.array([png(1)], pa.large_binary()),
        pa.array([None], pa.null()),
        pa.array([png(1)]).dictionary_encode(),
    ):
        pq.write_table(pa.table(rows | {"jpg_1": values}), tmp_path / "a.parquet")
        assert len(list(read_records(tmp_path / "a.parquet"))) == 1


def test_a_parquet_row_with_an_undecodable_caption_is_dropped(tmp_path):
    caption = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary()).view(pa.string())
    images = {"jpg_0": [png(0)] * 3, "jpg_1": [png(1)] * 3, "label_0": [1.0] * 3}
    pq.write_table(pa.table({"caption": caption} | images), tmp_path / "a.parquet")
    a, bad, c = read_records(tmp_path / "a.parquet")
    assert (a.prompt, c.prompt) == ("a", "c") and bad == Dropped("a.parquet:1", "empty caption")


def test_paths_of_published_data_sets_must_stay_in_their_folder(tmp_path):
    """Paths in user-made .jsonl files may be anywhere; `diffalign user choose` writes such files."""
    good(tmp_path / "data")
    shutil.copy(tmp_path / "data/0.png", tmp_path / "outside.png")
    absolute = str(tmp_path / "outside.png")
    for bad in ("../outside.png", "a/../../outside.png", absolute):
        hpd = {"prompt": "a", "file_path": ["0.png", bad], "human_preference": [1, 0]}
        ranked = {"prompt": "a", "image_path": [bad, "1.png"], "rank": [1, 2]}
        image_reward = {"prompt": "a", "generations": ["0.png", bad], "ranking": [1, 2]}
        v3 = {"prompt": "a", "path1": bad, "path2": "0.png"}
        fine = {"prompt": "a", "file_path": ["0.png", "1.png"], "human_preference": [1, 0]}
        (tmp_path / "data/train.json").write_text(json.dumps([hpd, ranked, image_reward, v3, fine]))
        *dropped, kept = read_records(tmp_path / "data/train.json")
        assert isinstance(kept, Record) and [d.kind for d in dropped] == ["bad path"] * 4
        assert all("leads out of the data set's folder" in d.reason for d in dropped)
        (tmp_path / "data/v3.jsonl").write_text(json.dumps(v3))
        assert [d.kind for d in read_records(tmp_path / "data/v3.jsonl")] == ["bad path"]
    for name in ("../outside.png", absolute):
        own = {"prompt": "a", "chosen": name, "rejected": "1.png"}
        (tmp_path / "data/own.jsonl").write_text(json.dumps(own))
        (record,) = read_records(tmp_path / "data/own.jsonl")
        assert record.images[0].read() == png(0)


def test_names_in_w_and_l_folders_must_stay_in_them(tmp_path):
    good(tmp_path / "w"), good(tmp_path / "l")
    rows = [
        {"image": "../../x.png", "prompt": "a"},
        {"image": "a\0.png", "prompt": "a"},
        {"image": "0.png", "prompt": "a"},
    ]
    (tmp_path / "prompts.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    out, nul, kept, *_ = read_records(tmp_path)
    assert (out.kind, nul.kind, kept.id) == ("bad path", "bad path", "0.png")


def test_byte_order_marks_are_removed_from_prompts(tmp_path):
    mark = "\ufeff"
    good(tmp_path / "w", 1), good(tmp_path / "l", 1)
    (tmp_path / "prompts.txt").write_text(f"{mark}small red circle\r\nb", encoding="utf-8", newline="")
    assert [r.prompt for r in read_records(tmp_path)] == ["small red circle", "b"]
    (tmp_path / "w/prompt.txt").write_text(f"{mark}a dog\n", encoding="utf-8")
    assert {r.prompt for r in read_targets(tmp_path / "w")} == {"a dog"}
    (tmp_path / "w/prompt.txt").unlink()
    (tmp_path / "w/0.txt").write_text(f"{mark}a dog\n", encoding="utf-8")
    (tmp_path / "w/1.txt").write_text("é", encoding="latin-1")
    a, b = read_targets(tmp_path / "w")
    assert a.prompt == "a dog" and b.reason.startswith("bad caption: '") and "is not UTF-8" in b.reason
    (tmp_path / "w/metadata.jsonl").write_text(mark + json.dumps({"file_name": "0.png", "text": "x"}), encoding="utf-8")
    assert read_targets(tmp_path / "w")[0].prompt == "x"
    entry = {"prompt": "a", "path1": "w/0.png", "path2": "l/0.png"}
    (tmp_path / "test.json").write_text(mark + json.dumps([entry]), encoding="utf-8")
    assert next(iter(read_records(tmp_path / "test.json"))).prompt == "a"


def test_hidden_files_are_skipped(tmp_path):
    for side in "wl":
        good(tmp_path / side, 1)
        (tmp_path / side / "._0.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    assert [r.id for r in read_records(tmp_path)] == ["0.png", "1.png"]


def test_contradicting_labels_are_dropped_with_a_reason(tmp_path):
    n = 5
    table = {"caption": ["a"] * n, "jpg_0": [png(0)] * n, "jpg_1": [png(1)] * n}
    table |= {"label_0": [1.0, 1.0, 0.0, 0.5, 0.5], "label_1": [0.0, 1.0, 0.0, 0.5, 1.0]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert [getattr(x, "reason", "kept") for x in read_records(tmp_path / "a.parquet")] == [
        "kept",
        "contradicting labels: label_0 = 1 and label_1 = 1",
        "contradicting labels: label_0 = 0 and label_1 = 0",
        "tie",
        "contradicting labels: label_0 = 0.5 and label_1 = 1",
    ]
    rows = [{"prompt": "a", "file_path": ["0", "1"], "human_preference": x} for x in ([1, 1], [0, 0], [1, 0.5], [0, 1])]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    kinds = [getattr(x, "kind", "kept") for x in read_records(tmp_path / "train.json")]
    assert kinds == ["contradicting labels"] * 3 + ["kept"]
    items = [
        {"prompt_id": p, "prompt": "a", "image_path": f"x/{p}{k}.webp", "rank": r}
        for p, ranks in (("p", (1, 0)), ("q", (1, 2)))
        for k, r in enumerate(ranks)
    ]
    (tmp_path / "test_1.json").write_text(json.dumps(items))
    zero, kept = read_records(tmp_path / "test_1.json")
    assert zero.reason == "label out of range: 0" and kept.ranks == (1, 2)


def test_transparent_images_are_composited_over_white_in_training_and_scoring(tmp_path):
    """Latents do not depend on the colour of fully transparent pixels."""
    rows = []
    for k, below in enumerate([(0, 255, 0, 0), (0, 0, 0, 0)]):
        image = Image.new("RGBA", (8, 8), below)
        image.paste((255, 0, 0, 255), (4, 0, 8, 8))
        image.save(tmp_path / f"{k}.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "2.png", transparency=1)
    (tmp_path / "3.png").write_bytes(png(3))
    rows = [{"prompt": "a", "chosen": f"{k}.png", "rejected": "3.png"} for k in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = build(tmp_path / "a.jsonl", tmp_path / "run")
    a, b, c = (pairs[0, k].x[0] for k in range(3))
    assert a[:, 0, 0].tolist() == [1, 1, 1] and torch.equal(a, b) and c.unique().tolist() == [1]


ROWS = {
    "pairs.jsonl": {
        "prompt": "p",
        "chosen": "0.png",
        "rejected": "1.png",
        "prob": 0.9,
        "scores": [2, 1],
        "annotator": "me",
    },
    "ratings.jsonl": {
        "prompt": "p",
        "images": ["0.png", "1.png"],
        "scores": {"a": [1, 2], "phi": [0, 1]},
        "ranking": [1, 2],
    },
    "v3.jsonl": {"prompt": "p", "path1": "0.png", "path2": "1.png", "confidence": 0.8},
    "train.json": {"prompt": "p", "file_path": ["0.png", "1.png"], "human_preference": [1, 0]},
    "test.json": {"prompt": "p", "image_path": ["0.png", "1.png", "2.png"], "rank": [1, 2, 3]},
    "test_1.json": {"prompt_id": "7", "prompt": "p", "image_path": "x/0.png", "rank": 1, "overall_rating": 3},
}
WEIRD = [
    None,
    True,
    -1,
    0,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\ud800",
    "a\0b",
    "x" * 300,
    "../0.png",
    [],
    {},
    [[]],
    ["0.png"],
    [1],
    {"a": 1},
    {"a": [1, 2]},
    [None, None],
    ["\udfff", "0.png"],
    "0.png",
    [10**400, 1],
]


def changed(row, random):
    """The row with one of its values, at any depth, replaced by an odd value or removed."""
    row = json.loads(json.dumps(row))
    place, key = row, random.choice(list(row))
    while isinstance(place[key], (list, dict)) and len(place[key]) and random.random() < 0.5:
        place = place[key]
        key = int(random.integers(len(place))) if isinstance(place, list) else random.choice(list(place))
    if random.random() < 0.1:
        del place[key]
    else:
        place[key] = WEIRD[int(random.integers(len(WEIRD)))]
    return row


@pytest.mark.parametrize("name", ROWS)
def test_fuzzed_lists_give_records_or_dropped_lines(tmp_path, name):
    """Values and bytes are fuzzed. Kept records can be read, and dropped ones can be written to the list."""
    good(tmp_path)
    random = np.random.default_rng(7)
    for _ in range(40):
        rows = [changed(ROWS[name], random) if random.random() < 0.7 else ROWS[name] for _ in range(12)]
        if name.endswith(".json"):
            (tmp_path / name).write_text(json.dumps(rows))
        else:
            lines = [bytearray(json.dumps(row).encode()) for row in rows]
            for line in lines:
                if random.random() < 0.3:
                    line[int(random.integers(len(line)))] = int(random.choice([0, 9, 34, 92, 123, 128, 195, 255]))
            (tmp_path / name).write_bytes(b"\n".join(lines))
        found = list(read_records(tmp_path / name))
        for one in found:
            if isinstance(one, Dropped):
                json.dumps(one._asdict()).encode()
                assert one.reason and len(one.reason) < 300 and "\n" not in one.reason
            else:
                assert one.prompt.encode() and len({*one.ranks}) > 1 and np.isfinite(one.ranks).all()
                for ref in one.images:
                    with suppress(OSError, ValueError):
                        decode(ref.read())
        if name == "pairs.jsonl":
            assert len(found) == 12


def test_fuzzed_parquet_files_give_records_or_a_value_error(tmp_path):
    table = {
        "caption": ["é"] * 4,
        "jpg_0": [png(0)] * 4,
        "jpg_1": [png(1)] * 4,
        "label_0": [1.0] * 4,
        "user_id": [3] * 4,
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=2)
    data, random, refused = (tmp_path / "a.parquet").read_bytes(), np.random.default_rng(3), 0
    for _ in range(400):
        new = bytearray(data)
        for _ in range(2):
            new[int(random.integers(len(new)))] = int(random.integers(256))
        (tmp_path / "b.parquet").write_bytes(new)
        try:
            for record in read_records(tmp_path / "b.parquet"):
                for ref in getattr(record, "images", ()):
                    try:
                        decode(ref.read())
                    except (OSError, ValueError):
                        refused += 1
        except ValueError as error:
            assert "b.parquet" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 20


def test_huge_integers_are_rejected_as_labels():
    assert bad_label(10**400) == "label out of range: 1" + "0" * 59 + "... (401 characters)"
