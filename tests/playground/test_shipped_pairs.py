"""The shipped preference pairs: two regimes, as many as promised, true to the annotators who made them."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from diffalign.data.readers import read_records
from diffalign.playground import SHIPPED_PAIRS, Judge
from diffalign.playground.annotators import label
from diffalign.playground.ratings import unpack_pairs

LARGE = ("playground_own", "playground_others")


def scores(word: str, n: int) -> tuple[Tensor, Tensor]:
    """The true scores of the winners and losers of the first n pairs, [n] each."""
    table = pq.read_table(SHIPPED_PAIRS[word]).slice(0, n).to_pydict()
    both = []
    for column in ("jpg_0", "jpg_1"):
        images = [pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB")) for data in table[column]]
        both.append(Judge().score(torch.stack(images).float() / 255, table["caption"]))
    first = torch.tensor(table["label_0"]) == 1
    return torch.where(first, *both), torch.where(first, *both[::-1])


@pytest.mark.parametrize("word", LARGE)
def test_each_regime_has_four_thousand_pairs(word: str) -> None:
    assert pq.read_metadata(SHIPPED_PAIRS[word]).num_rows >= 4000


def test_a_word_reads_the_shipped_pairs() -> None:
    assert len(list(read_records("playground"))) == pq.read_metadata(SHIPPED_PAIRS["playground"]).num_rows >= 260


@pytest.mark.parametrize("word", SHIPPED_PAIRS)
def test_winners_are_better_as_annotators_with_noise_see_it(word: str) -> None:
    """At a temperature of .35 points and margins of this size, annotators are right in about nine of ten cases."""
    won, lost = scores(word, 320)
    assert 0.8 < (won > lost).float().mean() < 0.99
    assert (won - lost).mean() > 0.6


def test_other_generators_are_so_much_worse_that_their_winners_are_no_better_than_the_base() -> None:
    """What fine-tuning on winners is to be pulled down by."""
    own, others = (scores(word, 1500) for word in LARGE)
    base = torch.cat(own).mean()
    assert torch.cat(others).mean() < base - 0.5
    assert others[0].mean() < base


def test_unpacked_pairs_can_be_labelled_again(tmp_path: Path) -> None:
    assert unpack_pairs(SHIPPED_PAIRS["playground"], tmp_path / "pairs", 8) == 8
    kept, compared = label(tmp_path / "pairs", tmp_path / "again.jsonl", labels="random", min_margin=0)
    assert (kept, compared) == (8, 8)
