"""The playground world: captions, renderer, exact judge, annotators."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torchvision.utils import save_image

from diffalign.playground import Judge
from diffalign.playground.annotators import TASTES, Annotator, label, load
from diffalign.playground.judge import ASPECTS, look
from diffalign.playground.world import SHAPES, Wish, captions, imagine, masks, parse, wishes


def test_every_caption_parses_back_to_its_wish() -> None:
    everything = wishes(held_out=False) + wishes(held_out=True)
    assert len(everything) == len({w.caption for w in everything}) == 6 * 4 * 4 * 3 * 5
    assert all(parse(w.caption) == w for w in everything)
    assert Wish("red", "circle", "white", "small", "left").caption == "small red circle left on white"


@pytest.mark.parametrize("text", ["", "a dog", "red circle white", "red dog on white", "huge red circle on white"])
def test_text_from_elsewhere_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a playground caption"):
        parse(text)


def test_one_in_eight_combinations_is_held_out_evenly() -> None:
    held_out = {(w.colour, w.shape, w.background) for w in wishes(held_out=True)}
    assert len(held_out) == 6 * 4 * 4 / 8
    for position, values in ((0, 6), (1, 4), (2, 4)):
        assert len({c[position] for c in held_out}) == values
    assert not {parse(c).held_out for c in captions(300, held_out=False)} - {False}
    assert captions(50, held_out=True, seed=1) == captions(50, held_out=True, seed=1)
    assert len(set(captions(180, held_out=True))) == 180


def test_shapes_have_the_area_and_centre_they_are_asked_for() -> None:
    """A circle of radius 5 has area 25 pi = 78.5 pixels; so has every shape of 'radius' 5."""
    drawn = masks(torch.tensor([16.0]), torch.tensor([15.0]), torch.tensor([5.0]))[0]
    grid = torch.arange(32) + 0.5
    for name, mask in zip(SHAPES, drawn, strict=True):
        assert abs(mask.sum().item() - 78.5) < 2.5, name
        assert abs((mask.sum(0) @ grid / mask.sum()).item() - 16) < 0.05, name
        assert abs((mask.sum(1) @ grid / mask.sum()).item() - 15) < 0.15, name


def test_judge_is_exact_on_clean_renders() -> None:
    chosen = [parse(c) for c in captions(1024, held_out=False)]
    scene = imagine(chosen, seed=3)._replace(texture=None)
    measured = Judge().measure(scene.render(), [w.caption for w in chosen])
    for aspect in ("colour", "shape", "background", "size"):
        assert measured[aspect].mean() >= 0.999, aspect
    seen, there = look(scene.render())
    assert there.all()
    assert (seen.x - scene.x).abs().max() < 0.6
    assert (seen.radius - scene.radius).abs().max() < 0.5


def test_textures_spoil_cleanliness_and_hide_nothing_else() -> None:
    prompts = captions(1024, held_out=False)
    scene = imagine([parse(p) for p in prompts], seed=4)
    textured = Judge().measure(scene.render(), prompts)
    clean = Judge().measure(scene._replace(texture=None).render(), prompts)
    for aspect in ("colour", "shape", "background", "size"):
        assert textured[aspect].mean() >= 0.998, aspect
    for aspect in ("vivid", "place"):
        assert (textured[aspect] - clean[aspect]).abs().mean() < 0.03, aspect
    assert clean["clean"].mean() > 0.9
    assert textured["clean"].quantile(0.1) < 0.45 and textured["clean"].quantile(0.9) > 0.85


def test_a_good_picture_is_likely_but_not_usual() -> None:
    """The spread of the renders, without which there is nothing to prefer; the best of 64 is what can be reached."""
    prompts = captions(180, held_out=True)
    asked = [parse(p) for p in prompts]
    scores = torch.stack([Judge().score(imagine(asked, seed=k).render(), prompts) for k in range(64)])
    assert scores.std(0).mean() > 0.68
    best = scores.amax(0).mean()
    assert best - scores.mean() > 1.4
    assert 0.01 < (scores > best - 0.5).float().mean() < 0.2


def test_judge_sees_every_kind_of_mistake() -> None:
    asked = parse("small red circle left on white")
    right = imagine([asked], seed=0)
    for aspect, wrong in {
        "colour": "small blue circle left on white",
        "shape": "small red square left on white",
        "background": "small red circle left on black",
        "size": "large red circle left on white",
    }.items():
        measured = Judge().measure(imagine([parse(wrong)], seed=0).render(), [asked.caption])
        assert measured[aspect].item() == 0, aspect
        others = {"colour", "shape", "background", "size"} - {aspect}
        assert all(measured[o].item() == 1 for o in others), aspect
    elsewhere = Judge().measure(imagine([parse("small red circle right on white")], seed=0).render(), [asked.caption])
    assert elsewhere["place"] < 0.05 < Judge().measure(right.render(), [asked.caption])["place"]


def test_vividness_and_placement_are_measured_on_a_scale() -> None:
    """Colour = grey + v (pure - grey); place = exp(-d^2 / 8): at distance 2 from its place exp(-.5) = .6065."""
    scene = imagine([parse("large green circle on white")] * 3, seed=1)
    pure = torch.tensor([[0.05, 0.70, 0.12]])
    vivid = torch.tensor([[0.4], [0.7], [1.0]])
    scene = scene._replace(
        colour=0.55 + vivid * (pure - 0.55),
        x=torch.tensor([16.0, 18.0, 16.0]),
        y=torch.tensor([16.0, 16.0, 16.0]),
        texture=None,
    )
    measured = Judge().measure(scene.render(), ["large green circle on white"] * 3)
    assert torch.allclose(measured["vivid"], vivid[:, 0], atol=0.03)
    assert torch.allclose(measured["place"], torch.tensor([1.0, 0.6065, 1.0]), atol=0.01)


def test_an_empty_image_and_noise_score_low_and_never_fail() -> None:
    blank, noise = (
        torch.full((1, 3, 32, 32), 0.95),
        torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    )
    measured = Judge().measure(torch.cat([blank, noise]), ["red circle on white"] * 2)
    assert measured["colour"].sum() == measured["shape"].sum() == measured["place"].sum() == 0
    assert set(measured) == set(ASPECTS)


def test_judge_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(ValueError, match="the playground judge needs float images"):
        Judge().score(torch.zeros(1, 3, 64, 64), ["red circle on white"])
    with pytest.raises(ValueError, match="unknown aspects"):
        Judge(taste={"beauty": 1.0})


def test_annotators_follow_their_taste_and_their_noise() -> None:
    prompts = captions(400, held_out=False)
    chosen = [parse(c) for c in prompts]
    first, second = imagine(chosen, seed=1).render(), imagine(chosen, seed=2).render()
    vivid, muted = Annotator("vivid"), Annotator("muted")
    likes, margin = vivid.choose(first, second, prompts, range(400))
    assert (likes == (margin > 0)).float().mean() > 0.8
    dislikes, _ = muted.choose(first, second, prompts, range(400))
    assert (likes == dislikes).float().mean() < 0.25
    assert torch.equal(likes, vivid.choose(first, second, prompts, range(400))[0])
    coin, margin = Annotator("vivid", temperature=1e6).choose(first, second, prompts, range(400))
    assert abs((coin == (margin > 0)).float().mean() - 0.5) < 0.08
    with pytest.raises(ValueError, match="no annotator 'nobody'"):
        Annotator("nobody")
    assert set(TASTES) == {"common", "vivid", "muted", "tidy", "bold", "modest"}


def test_random_labels_say_nothing_about_the_truth(tmp_path: Path) -> None:
    """Of two pairs with adjacent true margins one is labelled correctly, so 40 of 80 pairs are. (Independent coins
    would deviate by 9 or more in one case of 20.) And the winners' mean true margin is nearly 0 beside the mean
    margin."""
    prompts = captions(80, held_out=False)
    scenes = imagine([parse(p) for p in prompts for _ in "ab"], seed=0).render()
    (tmp_path / "images").mkdir()
    lines = []
    for i, image in enumerate(scenes):
        save_image(image, tmp_path / f"images/{i}.png")
        lines.append(json.dumps({"image": f"images/{i}.png", "prompt": prompts[i // 2], "prompt_id": str(i // 2)}))
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    rows, images = load(tmp_path)
    truth = dict(zip((r["image"] for r in rows), Judge().score(images, [r["prompt"] for r in rows]), strict=True))
    chosen = []
    for seed in range(2):
        assert label(tmp_path, tmp_path / "pairs.jsonl", min_margin=0.0, labels="random", seed=seed) == (80, 80)
        pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
        margins = torch.stack([truth[p["chosen"]] - truth[p["rejected"]] for p in pairs])
        assert abs(int((margins > 0).sum()) - 40) <= 1
        assert margins.mean().abs() < 0.03 * margins.abs().mean()
        assert all(p["scores"][0] >= p["scores"][1] for p in pairs), "the scores do not tell which one is better"
        chosen.append([p["chosen"] for p in pairs])
    assert chosen[0] != chosen[1]
