"""The published scorers of the CLIP family, on tiny models with the layouts of the published files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from reward_models import Scorer, load_scorer
from reward_models.clip.aesthetic import ORIGINAL, Head
from reward_models.clip.published import aesthetic, hps_v2, hps_v2_1, pickscore
from reward_models.clip.text import transformers_clip_tokenizer
from reward_models.weights import read_state, save_state

SIZE = 28
VISION = {"image_size": SIZE, "layers": 2, "width": 48, "head_width": 16, "patch_size": 14}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
ARCHITECTURE = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
PROMPTS = ["a red cube", "two  dogs", "", "a red cube", "caf&eacute; &amp; bar, a photo of a very long prompt " * 12]
NAMES = ["hps_v2", "hps_v2.1", "pickscore", "aesthetic", "social_reward"]
Files = dict[str, Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A tiny model for each published file, in its layout."""
    folder = tmp_path_factory.mktemp("published")
    tiny = {"plain": ARCHITECTURE, "quick": {**ARCHITECTURE, "quick_gelu": True}}
    paths = {name: folder / f"{name}.json" for name in tiny}
    for name, config in tiny.items():
        paths[name].write_text(json.dumps(config))
    hps = _random(open_clip.CLIP(**tiny["plain"]), 0).half().state_dict()
    for name in ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"):
        torch.save({"state_dict": hps}, folder / name)
    social = _random(open_clip.CLIP(**tiny["quick"]), 1).half().state_dict()
    torch.save({**social, "input_resolution": torch.tensor(SIZE)}, folder / "social.pth")
    save_state(_random(open_clip.CLIP(**tiny["quick"]), 2).state_dict(), folder / "openai.safetensors")
    torch.save(_random(Head(24), 3).state_dict(), folder / ORIGINAL)
    _transformers_clip().save_pretrained(folder / "pickscore")
    paths |= {"hps": folder, "pickscore": folder / "pickscore", "openai": folder / "openai.safetensors"}
    return paths | {"social": folder / "social.pth", "head": folder / ORIGINAL}


def _random(network: Any, seed: int) -> Any:
    """Randomise zeros and ones, so that every tensor and the text affect the score."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name != "logit_scale":
                parameter.normal_(0, 0.3, generator=generator)
    return network.eval()


def _transformers_clip() -> CLIPModel:
    layers = {"num_hidden_layers": 2, "hidden_act": "gelu"}
    text = {
        "vocab_size": 49408,
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "eos_token_id": 2,
    }
    vision = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 3, "image_size": SIZE}
    config = CLIPConfig(
        text_config={**layers, **text}, vision_config={**layers, **vision, "patch_size": 14}, projection_dim=24
    )
    return _random(CLIPModel(config), 4)


def _spec(name: str, files: Files) -> str:
    """Scorer specs as a user writes them."""
    if name == "aesthetic":
        return f"aesthetic,weights={files['head']},clip={files['openai']},architecture={files['quick']}"
    weights = files[{"pickscore": "pickscore", "social_reward": "social"}.get(name, "hps")]
    return f"{name},weights={weights},architecture={files['quick' if name == 'social_reward' else 'plain']}"


@pytest.fixture(scope="module")
def scorers(files: Files) -> dict[str, Any]:
    return {name: load_scorer(_spec(name, files), "cpu") for name in NAMES}


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (255 * torch.rand(5, 3, 45, 38, generator=generator)).round() / 255


def _cosines(network: Any, pixels: Tensor, texts: list[str]) -> Tensor:
    with torch.no_grad():
        image, text = network.encode_image(pixels, True), network.encode_text(open_clip.tokenize(texts), True)
    return (image * text).sum(-1)


def _crop(images: Tensor) -> Tensor:
    """Independent implementation of the crop rules: Pillow with torchvision's and open_clip's transforms."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms.functional import to_pil_image

    transform = image_transform_v2(PreprocessCfg(size=SIZE), is_train=False)
    return torch.stack([transform(to_pil_image((255 * x).round().byte())) for x in images])


@pytest.mark.parametrize("name", ["hps_v2", "hps_v2.1"])
def test_hps_equals_open_clip(name: str, scorers: dict[str, Any], files: Files, images: Tensor) -> None:
    """45 x 38 -> 28 x round(38 * 28 / 45) = 24, padded by 2 left and right with black; the overshoot is kept."""
    network = open_clip.CLIP(**ARCHITECTURE).eval()
    network.load_state_dict(torch.load(files["hps"] / "HPS_v2_compressed.pt")["state_dict"])
    small = F.interpolate(images, (28, 24), mode="bicubic", antialias=True)
    pixels = (F.pad(small, (2, 2)) - _column(open_clip.OPENAI_DATASET_MEAN)) / _column(open_clip.OPENAI_DATASET_STD)
    cosines = _cosines(network, pixels, PROMPTS)
    torch.testing.assert_close(scorers[name].score(images, PROMPTS), cosines, atol=1e-5, rtol=0)
    for unit, factor in {"x100": 100, "logit": network.logit_scale.exp().item()}.items():
        build = hps_v2 if name == "hps_v2" else hps_v2_1
        scorer = build(weights=str(files["hps"]), architecture=str(files["plain"]), unit=unit)  # type: ignore[arg-type]
        torch.testing.assert_close(scorer.score(images, PROMPTS), cosines * factor, atol=1e-3, rtol=1e-5)
        assert scorer.unit == unit


def _column(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)


def test_hps_without_antialias_changes_the_score(scorers: dict[str, Any], files: Files, images: Tensor) -> None:
    old = hps_v2(weights=str(files["hps"]), architecture=str(files["plain"]), antialias=False)
    assert (old.score(images, PROMPTS) - scorers["hps_v2"].score(images, PROMPTS)).abs().max() > 1e-3
    small = F.interpolate(images, (28, 24), mode="bicubic", antialias=False)
    pixels = (F.pad(small, (2, 2)) - _column(open_clip.OPENAI_DATASET_MEAN)) / _column(open_clip.OPENAI_DATASET_STD)
    torch.testing.assert_close(old.preprocess(images), pixels, atol=1e-5, rtol=0)


def test_pickscore_equals_transformers(scorers: dict[str, Any], files: Files, images: Tensor) -> None:
    """45 x 38 -> int(28 * 45 / 38) = 33 x 28; transformers crops from int(2.5) = 2, torchvision too, as it rounds to
    even. Of 31 x 28 it crops from int(1.5) = 1, torchvision from 2."""
    model, pixels = CLIPModel.from_pretrained(files["pickscore"]).eval(), _crop(images)
    tokens = transformers_clip_tokenizer(TEXT)(PROMPTS)
    with torch.no_grad():
        out = model(input_ids=tokens, pixel_values=pixels)
    torch.testing.assert_close(scorers["pickscore"].score(images, PROMPTS), out.logits_per_image.diag())
    assert scorers["pickscore"].unit == "logit"
    cropped = (images[..., 1:29, :28] - _column(open_clip.OPENAI_DATASET_MEAN)) / _column(open_clip.OPENAI_DATASET_STD)
    torch.testing.assert_close(scorers["pickscore"].preprocess(images[..., :31, :28]), cropped, atol=1e-5, rtol=0)


def test_pickscore_reads_prompts_as_transformers_does() -> None:
    """No unescaping: `&eacute;` is `&`, `eacute`, `;`. The ids end with 49407, also after truncation at 77."""
    ours = transformers_clip_tokenizer(TEXT)(PROMPTS)
    plain = open_clip.tokenize(PROMPTS)
    assert ours.shape == plain.shape
    assert ours[0].tolist()[:5] == plain[0].tolist()[:5] == [49406, 320, 736, 11353, 49407]
    assert ours[0, 5:].eq(49407).all() and plain[0, 5:].eq(0).all()
    assert ours[2].tolist() == [49406] + [49407] * 76
    ids = open_clip.SimpleTokenizer()
    assert ours[4, :3].tolist() == [49406, *ids.encode("caf"), *ids.encode("&")]
    assert plain[4, :2].tolist() == [49406, *ids.encode("café")]
    assert ours[4, 76] == plain[4, 76] == 49407 and ours[4, 75] != 49407


def test_pickscore_uses_the_tokenizer_of_the_folder(files: Files, tmp_path: Path, images: Tensor) -> None:
    for file in files["pickscore"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other = transformers_clip_tokenizer(TEXT).tokenizer
    other.add_special_tokens({"pad_token": "!"})
    other.save_pretrained(tmp_path)
    scorer = pickscore(weights=str(tmp_path), architecture=str(files["plain"]))
    assert scorer.tokenize(["a"])[0, 3:].eq(0).all()
    same = pickscore(weights=str(files["pickscore"]), architecture=str(files["plain"]))
    assert torch.equal(scorer.score(images, PROMPTS), same.score(images, PROMPTS))  # padding comes after the end


def test_social_reward_equals_open_clip(scorers: dict[str, Any], files: Files, images: Tensor) -> None:
    network = open_clip.CLIP(**ARCHITECTURE, quick_gelu=True).eval()
    network.load_state_dict({k: v for k, v in torch.load(files["social"]).items() if k != "input_resolution"})
    expected = _cosines(network, _crop(images), PROMPTS)
    torch.testing.assert_close(scorers["social_reward"].score(images, PROMPTS), expected, atol=1e-5, rtol=0)


def test_aesthetic_is_one_affine_map_of_the_unit_vector(scorers: dict[str, Any], files: Files, images: Tensor) -> None:
    network = open_clip.CLIP(**ARCHITECTURE, quick_gelu=True).eval()
    network.load_state_dict(read_state(files["openai"]))
    with torch.no_grad():
        features = network.encode_image(_crop(images), normalize=True).double()
    state = {k: v.double() for k, v in torch.load(files["head"]).items()}
    matrix, offset = torch.eye(24, dtype=torch.float64), torch.zeros(24, dtype=torch.float64)
    for i in (0, 2, 4, 6, 7):
        matrix = state[f"layers.{i}.weight"] @ matrix
        offset = state[f"layers.{i}.weight"] @ offset + state[f"layers.{i}.bias"]
    expected = (features @ matrix.T + offset).squeeze(-1).float()
    scores = scorers["aesthetic"].score(images, PROMPTS)
    torch.testing.assert_close(scores, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-5)
    assert torch.equal(scores, scorers["aesthetic"].score(images, ["x"] * 5))


@pytest.mark.parametrize("name", NAMES)
def test_scorer_interface(name: str, scorers: dict[str, Any], images: Tensor) -> None:
    """float32 [B], independent of batch order and size; gradients to the pixels, none to the weights."""
    assert isinstance(scorers[name], Scorer)
    scorer = scorers[name]
    assert scorer.differentiable
    scores, order = scorer.score(images, PROMPTS), [3, 0, 4, 1, 2]
    assert scores.shape == (5,) and scores.dtype == torch.float32
    close = {"atol": 1e-5 * max(1.0, scores.abs().max().item()), "rtol": 0.0}
    shuffled = scorer.score(images[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(shuffled, scores[order], **close)  # type: ignore[arg-type]
    parts = [scorer.score(images[i : i + 2], PROMPTS[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), scores, **close)  # type: ignore[arg-type]
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.score(x, PROMPTS).sum(), x)
    assert gradient.isfinite().all() and (gradient.abs().sum((1, 2, 3)) > 0).all()
    assert not any(p.requires_grad for p in scorer.parameters()) and not scorer.training
    with pytest.raises(ValueError, match=r"images must be float in \[0, 1\] with shape \[B, 3, H, W\]; got uint8 "):
        scorer.score(images.byte(), PROMPTS)
    with pytest.raises(ValueError, match=r"got float32 \(5, 45, 38\)"):
        scorer.score(images[:, 0], PROMPTS)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_save_wrote_is_read_back(
    name: str, scorers: dict[str, Any], images: Tensor, tmp_path: Path
) -> None:
    scorers[name].save(tmp_path)
    again: Any = load_scorer(str(tmp_path), "cpu")
    assert torch.equal(again.score(images, PROMPTS), scorers[name].score(images, PROMPTS))
    assert again.unit == scorers[name].unit and again.rule == scorers[name].rule
    assert (tmp_path / "tokenizer.json").exists() == (name == "pickscore")


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_gives_float32_scores(name: str, scorers: dict[str, Any], files: Files, images: Tensor) -> None:
    full = scorers[name].score(images, PROMPTS)
    for dtype in ("bf16", "fp16"):
        scorer: Any = load_scorer(_spec(name, files), "cpu", dtype=dtype)  # type: ignore[arg-type]
        scores = scorer.score(images, PROMPTS)
        assert scores.dtype == torch.float32 and 0 < (scores - full).abs().max() < 0.1 * full.abs().max()
        tower = scorer.visual if name == "aesthetic" else scorer.clip.visual
        assert tower.conv1.weight.element_size() == 2
        if name != "aesthetic":  # else exp(logit_scale) would be off by 1 %
            assert torch.equal(scorer.logit_scale(), scorers[name].logit_scale())


@pytest.mark.parametrize("name", ["hps_v2", "aesthetic"])
def test_compile_reaches_the_image_tower(name: str, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *_, **__: compiled.append(self))
    scorer: Any = load_scorer(_spec(name, files), "cpu", compile=True)
    assert compiled == [scorer.visual if name == "aesthetic" else scorer.clip.visual]


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda s: s.pop("visual.ln_post.bias"), r"1 missing: visual\.ln_post\.bias"),
    "extra": (lambda s: s.update(adapter=torch.zeros(1)), "1 unexpected: adapter"),
    "shape": (
        lambda s: s.update(text_projection=torch.zeros(3, 4)),
        r"text_projection \[3, 4\] \(expected \[16, 24\]\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_tensors_that_do_not_fit_are_named(case: str, files: Files, tmp_path: Path) -> None:
    state = read_state(files["hps"] / "HPS_v2_compressed.pt")
    BROKEN[case][0](state)
    torch.save({"state_dict": state}, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=BROKEN[case][1]):
        hps_v2(weights=str(tmp_path / "broken.pt"), architecture=str(files["plain"]))


def test_tensors_of_transformers_and_of_a_head_that_do_not_fit_are_named(files: Files, tmp_path: Path) -> None:
    state = read_state(files["pickscore"] / "model.safetensors")
    del state["vision_model.encoder.layers.0.self_attn.v_proj.weight"]
    save_state(state, tmp_path / "pick.safetensors")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.v_proj\.weight' is missing"):
        pickscore(weights=str(tmp_path / "pick.safetensors"), architecture=str(files["plain"]))
    torch.save({"weight": torch.zeros(1, 24), "bias": torch.zeros(1)}, tmp_path / "v1.pth")  # LAION's first predictor
    with pytest.raises(ValueError, match=r"10 missing: layers\.0\.weight, .*2 unexpected: weight, bias"):
        aesthetic(weights=str(tmp_path / "v1.pth"), clip=str(files["openai"]), architecture=str(files["quick"]))


def test_converted_weights_in_the_folder_are_found(files: Files, scorers: dict[str, Any], tmp_path: Path) -> None:
    from reward_models.clip.convert import convert

    convert(files["hps"] / "HPS_v2_compressed.pt", tmp_path / "model.safetensors")
    scorer = hps_v2(weights=str(tmp_path), architecture=str(files["plain"]))
    assert torch.equal(scorer.clip.visual.proj, scorers["hps_v2"].clip.visual.proj)


def test_pillow_images_and_files_give_the_scores_of_their_tensors(
    scorers: dict[str, Any], images: Tensor, tmp_path: Path
) -> None:
    from torchvision.transforms.functional import to_pil_image

    pictures: list[Any] = [to_pil_image(x) for x in images]
    pictures[1].save(tmp_path / "one.png")
    pictures[1] = tmp_path / "one.png"
    pictures[2] = pictures[2].crop((0, 0, 30, 30))  # sizes may differ
    scores = scorers["pickscore"].score_images(pictures, PROMPTS, batch_size=2)
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(scores[kept], scorers["pickscore"].score(images, PROMPTS)[kept], atol=1e-4, rtol=1e-5)
    alone = scorers["pickscore"].score(images[2:3, :, :30, :30], PROMPTS[2:3])
    torch.testing.assert_close(scores[2:3], alone, atol=1e-4, rtol=1e-5)


def test_published_numbers_on_the_real_weights() -> None:
    """`A cat with two horns on its head` on the demo image of HPSv2 is 0.2876, on the grid of fp16 (0.00024)."""
    weights, image = os.environ.get("DIFFALIGN_HPSV2_WEIGHTS"), os.environ.get("DIFFALIGN_HPSV2_DEMO_IMAGE")
    if not (weights and image):
        pytest.skip("needs DIFFALIGN_HPSV2_WEIGHTS=HPS_v2_compressed.pt and DIFFALIGN_HPSV2_DEMO_IMAGE=demo_image.jpg")
    prompt = ["A cat with two horns on its head"]
    scores = [hps_v2(weights=weights, antialias=x).score_images([image], prompt).item() for x in (True, False)]
    assert min(abs(score - 0.2876) for score in scores) < 5e-4, scores
