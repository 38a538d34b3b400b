"""Samples of other generators: a folder that annotators compare, drawn by every generator, worse than the base."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torchvision.utils import save_image

from diffalign.commands import cli
from diffalign.data.readers import read_records
from diffalign.playground import BASE, Judge
from diffalign.playground.annotators import label, load
from diffalign.playground.card import samples
from diffalign.playground.others import generators, write_others
from diffalign.playground.ratings import draw, rate
from diffalign.playground.world import captions, parse


def test_a_folder_of_other_generators_can_be_labelled(tmp_path: Path) -> None:
    assert write_others(tmp_path, 12, samples_per_prompt=4) == 48
    rows, images = load(tmp_path)
    assert len(rows) == len(images) == 48
    assert {row["generator"] for row in rows} == set(generators())
    assert [row["prompt"] for row in rows[::4]] == captions(12, held_out=False)
    kept, compared = label(tmp_path, tmp_path / "pairs.parquet")
    assert compared == 24 and kept > 12 and len(list(read_records(tmp_path / "pairs.parquet"))) == kept
    first = (tmp_path / "manifest.jsonl").read_text(), images
    words = ["playground", "others", "--n", "12", "--samples-per-prompt", "4", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    assert (tmp_path / "manifest.jsonl").read_text() == first[0] and torch.equal(load(tmp_path)[1], first[1])
    assert json.loads(first[0].splitlines()[5])["image"] == "images/00001_1.png"


def test_annotators_rate_a_generated_folder(tmp_path: Path) -> None:
    """Six samples of each prompt make one group of four; who has the best true score is ranked first in most groups."""
    prompts = captions(30, held_out=False)
    repeated = [text for text in prompts for _ in range(6)]
    images = draw([parse(text) for text in repeated], seed=1)
    (tmp_path / "images").mkdir()
    rows = []
    for i, image in enumerate(images):
        save_image(image, tmp_path / f"images/{i}.png")
        rows.append({"image": f"images/{i}.png", "prompt": repeated[i], "prompt_id": str(i // 6)})
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = list(read_records(rate(tmp_path)))
    assert len(records) == 30
    truth = Judge().score(load(tmp_path)[1], repeated).view(30, 6)[:, :4]
    lines = [json.loads(line) for line in (tmp_path / "ratings.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == prompts and lines[1]["images"][0] == "images/6.png"
    assert all(sorted(line["ranking"]) == [1, 2, 3, 4] for line in lines)
    assert sum(line["ranking"][best] == 1 for line, best in zip(lines, truth.argmax(1), strict=True)) > 18


def test_they_are_worse_than_the_base() -> None:
    prompts = captions(24, held_out=True)
    base = samples(StableDiffusionPipeline.from_pretrained(BASE).to(torch.float32), prompts)
    mean = Judge().score(base, prompts).mean().item()
    scores = {name: Judge().score(made(prompts, 3), prompts).mean().item() for name, made in generators().items()}
    assert max(scores.values()) < mean and sum(scores.values()) / len(scores) < mean - 0.5, (mean, scores)
