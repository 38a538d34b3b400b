"""Training of BLIP scorers: aspects, statistics, folders, initial weights, and trainable weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import BlipConfig, BlipForImageTextRetrieval

from reward_models import load_scorer
from reward_models.blip.keys import to_published
from reward_models.blip.networks import ADDED, IMAGE_REWARD, find_tokenizer, new_head, to_grid
from reward_models.blip.scorers import ASPECTS, IMAGE_REWARD_TRAINS, BLIPScorer, vp_score
from reward_models.training import train_only

SIZE = 32
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cube", "two", "dog", "##s"]
VISION = dict(zip(IMAGE_REWARD["vision"], (SIZE, 16, 48, 192, 2, 3), strict=True))
TEXT = dict(zip(IMAGE_REWARD["text"], (len(WORDS) + 2, 32, 64, 2, 2, 16), strict=True))
ARCHITECTURE = {"vision": VISION, "text": TEXT, "context_length": 8}
PROMPTS = ["a red cube", "Two dogs", "", "a red cube", "two dogs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT's vocab.txt, and weights with one head in ImageReward's layout."""
    folder = tmp_path_factory.mktemp("twin")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    scorer = BLIPScorer(ARCHITECTURE, tokenizer=str(folder))
    torch.save(to_published(_random(scorer, 0).state_dict()), folder / "ImageReward.pt")
    return folder


def _random(scorer: BLIPScorer, seed: int) -> BLIPScorer:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return scorer.eval()


@pytest.fixture(scope="module")
def scorer(folder: Path) -> BLIPScorer:
    """A scorer with one head."""
    scorer = BLIPScorer(ARCHITECTURE, weights=str(folder), tokenizer=str(folder)).eval()
    scorer.set_statistics(0.3, 1.2)
    return scorer


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(5, 3, 45, 38, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def aspects(folder: Path) -> BLIPScorer:
    """A VP-Score with four heads."""
    settings: dict[str, Any] = {"aspects": ASPECTS, "aspect_weights": (4, 3, 2, 1)}
    return _random(BLIPScorer(ARCHITECTURE, tokenizer=str(folder), **settings), 1)


def test_aspects_are_heads_on_one_body(aspects: BLIPScorer, folder: Path, images: Tensor, tmp_path: Path) -> None:
    """Each aspect equals a scorer with that head alone. score = (4 z1 + 3 z2 + 2 z3 + z4) / 10 of the standardised
    rewards z."""
    pixels, state, alone = aspects.preprocess(images), to_published(aspects.state_dict()), []
    for k, name in enumerate(ASPECTS):
        body = {key: x for key, x in state.items() if not key.startswith("mlp.")}
        head = {key.replace(f".{name}.", "."): x for key, x in state.items() if key.startswith(f"mlp.{name}.")}
        save_file(body | head, tmp_path / f"{k}.safetensors")
        one = BLIPScorer(ARCHITECTURE, weights=str(tmp_path / f"{k}.safetensors"), tokenizer=str(folder)).eval()
        alone.append(one(pixels, PROMPTS))
        assert alone[-1].shape == (5,) and one.aspects == ()
    expected = torch.stack(alone, 1)
    rewards = aspects(pixels, PROMPTS)
    assert rewards.shape == (5, 4) and rewards.dtype == torch.float32 and rewards.std(1).min() > 0
    torch.testing.assert_close(rewards, expected)
    mean, std = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 0.5, 4.0])
    aspects.set_statistics(mean, std)
    z = (expected - mean) / std
    by_name = aspects.score_aspects(images, PROMPTS)
    assert list(by_name) == list(ASPECTS)
    torch.testing.assert_close(torch.stack(list(by_name.values()), 1), z)
    overall = (4 * z[:, 0] + 3 * z[:, 1] + 2 * z[:, 2] + z[:, 3]) / 10
    scores = aspects.score(images, PROMPTS)
    assert scores.shape == (5,) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, overall)


def test_a_folder_that_save_wrote_is_read_back(
    aspects: BLIPScorer, scorer: Any, images: Tensor, tmp_path: Path
) -> None:
    aspects.set_statistics([0.1, 0.2, 0.3, 0.4], 1.7)
    for name, saved in (("aspects", aspects), ("single", scorer)):
        saved.save(tmp_path / name)
        for again in (load_scorer(str(tmp_path / name), "cpu"), vp_score(weights=str(tmp_path / name))):
            assert isinstance(again, BLIPScorer)
            assert torch.equal(again.score(images, PROMPTS), saved.score(images, PROMPTS))
            assert again.unit == saved.unit == "standardised" and again.rule == saved.rule
            assert again.aspects == saved.aspects and again.architecture == saved.architecture
            assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(ValueError, match=r"scorer folder: its reward_config\.json already sets mean; leave it out"):
        vp_score(weights=str(tmp_path / "single"), mean=1.0)
    assert load_scorer(str(tmp_path / "single")).score_aspects(images, PROMPTS).keys() == {"overall"}  # type: ignore[attr-defined]


def test_statistics_and_aspects_are_checked(aspects: BLIPScorer, folder: Path) -> None:
    for mean, std in (([0.0, 1.0], 1.0), (0.0, 0.0), (math.nan, 1.0), (0.0, [1.0, 1.0, 1.0, -1.0])):
        with pytest.raises(ValueError, match="must be one or 4 finite numbers, std above 0"):
            aspects.set_statistics(mean, std)
    settings: dict[str, Any]
    for settings, message in (
        ({"aspects": ("a", "a")}, "distinct names"),
        ({"aspects": ("layers",)}, "distinct names"),
        ({"aspects": ("a", "b"), "aspect_weights": (1.0,)}, r"2 numbers of 0 or more, not all 0; got \[1\.0\]"),
        ({"aspects": ("a", "b"), "aspect_weights": (1.0, -1.0)}, "2 numbers of 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            BLIPScorer(ARCHITECTURE, tokenizer=str(folder), **settings)


def test_a_body_of_another_size_has_its_positions_interpolated(folder: Path, tmp_path: Path) -> None:
    """On a plane v(row, column) = column the cubic filter is symmetric: 4 to 2 columns give 0.40625, 2.59375.

    Output 0 is at input 0.5 * 2 - 0.5 = 0.5, between columns 0 and 1; the kernel of a = -0.75 weighs -1, 0, 1 and 2
    with -3, 19, 19, -3 of 32; column -1 is 0 again: (0 + 0 + 19 - 6) / 32 = 13 / 32.
    """
    grid = torch.cat([torch.full((1, 1, 2), 9.0), torch.arange(4.0).repeat(4).view(1, 16, 1).expand(1, 16, 2)], 1)
    small = to_grid(grid, 5)
    assert small[0, 0].tolist() == [9, 9]
    torch.testing.assert_close(small[0, 1:, 0], torch.tensor([13 / 32, 3 - 13 / 32] * 2))
    large = BLIPScorer(
        {**ARCHITECTURE, "vision": {**VISION, "image_size": 64}}, body=str(folder), tokenizer=str(folder)
    )
    positions = large.vision.embeddings.position_embedding
    theirs = torch.load(folder / "ImageReward.pt")["blip.visual_encoder.pos_embed"]
    assert positions.shape == (1, 17, 48) and torch.equal(positions[:, 0], theirs[:, 0])
    norm = "blip.text_encoder.embeddings.LayerNorm.bias"
    assert torch.equal(
        large.text.state_dict()["embeddings.LayerNorm.bias"], torch.load(folder / "ImageReward.pt")[norm]
    )
    state = torch.load(folder / "ImageReward.pt")
    del state["blip.text_encoder.embeddings.LayerNorm.bias"]
    torch.save(state, tmp_path / "body.pt")
    with pytest.raises(ValueError, match=r"1 missing: blip\.text_encoder\.embeddings\.LayerNorm\.bias"):
        BLIPScorer(ARCHITECTURE, body=str(tmp_path / "body.pt"), tokenizer=str(folder))


def test_a_transformers_checkpoint_loads_as_body(folder: Path, tmp_path: Path) -> None:
    config = BlipConfig(text_config={**TEXT, "hidden_act": "gelu"}, vision_config=VISION)
    theirs = BlipForImageTextRetrieval(config)
    theirs.save_pretrained(tmp_path)
    scorer = BLIPScorer(ARCHITECTURE, body=str(tmp_path), tokenizer=str(folder), aspects=("one",))
    for ours, other in ((scorer.vision, theirs.vision_model), (scorer.text, theirs.text_encoder)):
        state, wanted = ours.state_dict(), other.state_dict()
        assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in state)


def test_new_heads_start_as_those_of_image_reward() -> None:
    """Normal with deviation 1 / 769 in every layer for 768 features, biases 0."""
    torch.manual_seed(0)
    head = new_head(768)
    for layer in (head.layers[0], head.layers[2], head.layers[4]):
        assert isinstance(layer, torch.nn.Linear) and abs(layer.weight.std().item() * 769 - 1) < 0.05
    assert all(not p.any() for name, p in head.named_parameters() if name.endswith("bias"))
    dropouts = [layer.p for layer in head.layers if isinstance(layer, torch.nn.Dropout)]
    assert dropouts == [0.2, 0.2, 0.1]


def test_a_small_blip_scorer_can_be_trained(folder: Path) -> None:
    """Learns from random weights which of two images is brighter, with the training loss."""
    torch.manual_seed(0)
    scorer = BLIPScorer(ARCHITECTURE, tokenizer=str(folder), aspects=("a", "b"))
    assert all(p.requires_grad for p in scorer.parameters())
    optimizer = torch.optim.Adam(scorer.parameters(), lr=3e-3)
    noise = torch.rand(16, 3, SIZE, SIZE)
    pixels = torch.cat([noise * 0.5 + 0.5, noise * 0.5]) * 2 - 1
    for _ in range(30):
        better, worse = scorer(pixels, ["a red cube"] * 32).chunk(2)
        loss = F.softplus(worse - better)[:, 0].mean() + F.softplus(better - worse)[:, 1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    better, worse = scorer.eval()(pixels, ["a red cube"] * 32).chunk(2)
    assert (better[:, 0] > worse[:, 0]).all() and (better[:, 1] < worse[:, 1]).all()


def test_parameter_counts_of_image_reward(tmp_path: Path) -> None:
    """The file has 446,665,953 parameters. The two projections to 256 dimensions are not part of our network: 768 and
    1024 times 256, and 256 biases each. Trainable are 140,488,929: 7 image blocks of 12,596,224 and one without the
    1,024 weights of its norm1, the last norm's 2,048; 3 text layers of 9,844,992 and one without a query's 768 * 768;
    the head's 927,969."""
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, *(f"w{i}" for i in range(30522 - len(words)))]) + "\n")
    tokenizer = find_tokenizer(tmp_path, 30524)
    assert tokenizer.convert_tokens_to_ids(list(ADDED)) == [30522, 30523]
    with torch.device("meta"):
        scorer = BLIPScorer(tokenizer=str(tmp_path))
    projections = 256 * (768 + 1024) + 2 * 256
    assert sum(p.numel() for p in scorer.parameters()) + projections == 446_665_953
    assert sum(p.numel() for p in scorer.vision.parameters()) == 303_301_632
    assert sum(p.numel() for p in scorer.text.parameters()) == 141_977_088
    train_only(scorer, IMAGE_REWARD_TRAINS)
    trains = {name: p.numel() for name, p in scorer.named_parameters() if p.requires_grad}
    assert sum(trains.values()) == 140_488_929
    assert sum(n for name, n in trains.items() if name.startswith("vision.")) == 7 * 12_596_224 + 12_595_200 + 2_048
    assert sum(n for name, n in trains.items() if name.startswith("text.")) == 3 * 9_844_992 + 9_844_992 - 768 * 768
