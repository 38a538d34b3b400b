"""ImageReward on tiny models with the layout of the published file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

from reward_models import Scorer, load_scorer
from reward_models.blip.keys import to_published
from reward_models.blip.networks import ADDED, IMAGE_REWARD
from reward_models.blip.scorers import MEAN, STD, BLIPScorer, image_reward, vp_score
from reward_models.preprocess import CLIP_MEAN, CLIP_STD

SIZE = 32
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cube", "two", "dog", "##s", "photo", "of", ","]
VISION = dict(zip(IMAGE_REWARD["vision"], (SIZE, 16, 48, 192, 2, 3), strict=True))
TEXT = dict(zip(IMAGE_REWARD["text"], (len(WORDS) + 2, 32, 64, 2, 2, 512), strict=True))
ARCHITECTURE = {"vision": VISION, "text": TEXT, "context_length": 35}
PROMPTS = ["a red cube", "Two dogs", "", "a red cube", "a photo of two dogs, " * 12]
Files = dict[str, Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A tiny version of the published folder: ImageReward.pt with its unused tensors, and BERT's vocab.txt."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "twin.json").write_text(json.dumps(ARCHITECTURE))
    scorer = BLIPScorer(ARCHITECTURE, tokenizer=str(folder))
    torch.save(_state(scorer, 0), folder / "ImageReward.pt")
    return {"folder": folder, "pt": folder / "ImageReward.pt", "architecture": folder / "twin.json"}


def _state(scorer: BLIPScorer, seed: int) -> dict[str, Tensor]:
    """Random tensors with the published names; no zeros or ones that would hide an error."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, x in to_published(scorer.state_dict()).items():
        state[name] = torch.randn(x.shape, generator=generator) * 0.3 + (0.7 if "norm" in name.lower() else 0)
    unused = {"blip.vision_proj.weight": torch.zeros(4, 48), "blip.text_proj.bias": torch.zeros(4)}
    return state | unused | {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]}


def _spec(files: Files, name: str = "image_reward") -> str:
    return f"{name},weights={files['folder']},architecture={files['architecture']}"


@pytest.fixture(scope="module")
def scorer(files: Files) -> Any:
    return load_scorer(_spec(files), "cpu")


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (255 * torch.rand(5, 3, 45, 38, generator=generator)).round() / 255


class Formulas:
    """ImageReward's network from its formulas and published names, in float64, one text at a time without padding."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = {key: x.double() for key, x in state.items()}

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
        return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(0, 1).flatten(1)

    def vision(self, pixels: Tensor) -> Tensor:
        s, start = self.state, "blip.visual_encoder."
        patches = pixels.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1).double()
        x = patches @ s[f"{start}patch_embed.proj.weight"].flatten(1).T + s[f"{start}patch_embed.proj.bias"]
        x = torch.cat([s[f"{start}cls_token"][0], x]) + s[f"{start}pos_embed"][0]
        for i in range(VISION["num_hidden_layers"]):
            block = f"{start}blocks.{i}."
            qkv = self.linear(self.norm(x, f"{block}norm1", 1e-6), f"{block}attn.qkv").chunk(3, -1)
            x = x + self.linear(self.attend(qkv[0], qkv[1], qkv[2], heads=3), f"{block}attn.proj")
            hidden = F.gelu(self.linear(self.norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1"))
            x = x + self.linear(hidden, f"{block}mlp.fc2")
        return self.norm(x, f"{start}norm", 1e-6)

    def bert(self, x: Tensor, context: Tensor, name: str) -> Tensor:
        q, k, v = (self.linear(y, f"{name}.self.{z}") for y, z in ((x, "query"), (context, "key"), (context, "value")))
        out = self.linear(self.attend(q, k, v, heads=2), f"{name}.output.dense")
        return self.norm(out + x, f"{name}.output.LayerNorm", 1e-12)

    def features(self, pixels: Tensor, ids: list[int]) -> Tensor:
        start, image = "blip.text_encoder.", self.vision(pixels)
        x = self.state[f"{start}embeddings.word_embeddings.weight"][ids]
        x = x + self.state[f"{start}embeddings.position_embeddings.weight"][: len(ids)]
        x = self.norm(x, f"{start}embeddings.LayerNorm", 1e-12)
        for i in range(TEXT["num_hidden_layers"]):
            layer = f"{start}encoder.layer.{i}."
            x = self.bert(x, x, f"{layer}attention")
            x = self.bert(x, image, f"{layer}crossattention")
            hidden = self.linear(F.gelu(self.linear(x, f"{layer}intermediate.dense")), f"{layer}output.dense")
            x = self.norm(hidden + x, f"{layer}output.LayerNorm", 1e-12)
        return x[0]

    def reward(self, pixels: Tensor, ids: list[int]) -> float:
        x = self.features(pixels, ids)
        for i in (0, 2, 4, 6, 7):
            x = self.linear(x, f"mlp.layers.{i}")
        return x.item()


def _ids(prompt: str) -> list[int]:
    """[CLS], the words, [SEP], at most 35: word pieces of this file's prompts by hand."""
    pieces = prompt.lower().replace("dogs", "dog ##s").replace(",", " ,").split()
    ids = [2, *(WORDS.index(x) for x in pieces)]
    return [*ids[:34], 3]


def _pixels(images: Tensor) -> Tensor:
    """torchvision's own transforms on 8-bit Pillow images."""
    steps: list[Any] = [v2.Resize(SIZE, v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIZE), v2.ToImage()]
    transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(CLIP_MEAN, CLIP_STD)])
    return torch.stack([transform(to_pil_image((255 * x).round().byte())) for x in images])


def test_scores_equal_the_formulas_by_hand(files: Files, scorer: Any, images: Tensor) -> None:
    formulas = Formulas(torch.load(files["pt"]))
    rewards = [formulas.reward(x, _ids(p)) for x, p in zip(_pixels(images), PROMPTS, strict=True)]
    expected = (torch.tensor(rewards) - 0.16717362830052426) / 1.0333394966054072
    assert expected.std() > 0.1
    close = {"atol": 1e-5 * max(1.0, expected.abs().max().item()), "rtol": 0.0}
    torch.testing.assert_close(scorer.score(images, PROMPTS), expected, **close)  # type: ignore[arg-type]
    pixels = scorer.preprocess(images)
    torch.testing.assert_close(pixels, _pixels(images))
    torch.testing.assert_close(scorer(pixels, PROMPTS), torch.tensor(rewards), **close)  # type: ignore[arg-type]
    assert scorer.unit == "standardised"


def test_token_ids(files: Files, scorer: Any) -> None:
    """Lower case, 35 ids, starting with [CLS] and not [ENC]; the ids of [DEC] and [ENC] are the last two."""
    ids, mask = scorer.tokenize(PROMPTS)
    assert ids.shape == mask.shape == (5, 35) and ids.dtype == torch.int64
    for i, prompt in enumerate(PROMPTS):
        n = len(_ids(prompt))
        assert ids[i, :n].tolist() == _ids(prompt) and ids[i, n:].eq(0).all()
        assert mask[i].tolist() == [1] * n + [0] * (35 - n)
    assert len(_ids(PROMPTS[4])) == 35
    assert scorer.tokenizer.convert_tokens_to_ids(list(ADDED)) == [len(WORDS), len(WORDS) + 1]


def test_scorer_interface(scorer: Any, images: Tensor) -> None:
    """float32 [B], independent of batch order and size; gradients to the pixels, none to the weights."""
    any_scorer: object = scorer
    assert isinstance(any_scorer, Scorer)
    assert scorer.differentiable and not scorer.training
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
    assert not any(p.requires_grad for p in scorer.parameters())
    with pytest.raises(ValueError, match=r"images must be float in \[0, 1\] with shape \[B, 3, H, W\]; got uint8 "):
        scorer.score(images.byte(), PROMPTS)
    with pytest.raises(ValueError, match=r"got float32 \(5, 45, 38\)"):
        scorer.score(images[:, 0], PROMPTS)
    with pytest.raises(ValueError, match="one prompt per image"):
        scorer.score_aspects(images, PROMPTS[:2])


def test_following_the_gradient_raises_the_score(scorer: Any, images: Tensor) -> None:
    pixels, start = scorer.preprocess(images), scorer.score(images, PROMPTS)
    for _ in range(20):
        x = pixels.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(scorer.score_pixels(x, PROMPTS).sum(), x)
        pixels = x + 0.05 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert (scorer.score_pixels(pixels, PROMPTS) > start).all()


def test_padding_and_truncated_tokens_do_not_change_the_score(files: Files, scorer: Any, images: Tensor) -> None:
    long = BLIPScorer({**ARCHITECTURE, "context_length": 60}, weights=str(files["pt"]), tokenizer=str(files["folder"]))
    long.set_statistics(MEAN, STD)
    scores, more = scorer.score(images, PROMPTS), long.eval().score(images, PROMPTS)
    torch.testing.assert_close(more[:4], scores[:4], atol=1e-5, rtol=1e-5)
    assert (more[4] - scores[4]).abs() > 1e-3
    torch.testing.assert_close(scorer.score(images[4:], [PROMPTS[4] + "a red cube"]), scores[4:])


def test_text_encoder_has_no_causal_mask(scorer: Any, images: Tensor) -> None:
    """With a causal mask, [CLS] would not attend to any word, and all prompts would have the same score."""
    scores = scorer.score(images[:1].expand(3, -1, -1, -1), ["a red cube", "a red dog", "two dogs"])
    assert torch.pdist(scores[:, None]).min() > 1e-3


def test_the_head_is_one_affine_map(files: Files, scorer: Any) -> None:
    state = {k: x.double() for k, x in torch.load(files["pt"]).items() if k.startswith("mlp.")}
    matrix, offset = torch.eye(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    for i in (0, 2, 4, 6, 7):
        weight = state[f"mlp.layers.{i}.weight"]
        matrix, offset = weight @ matrix, weight @ offset + state[f"mlp.layers.{i}.bias"]
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    expected = (x.double() @ matrix.T + offset).squeeze(-1).float()
    torch.testing.assert_close(scorer.mlp(x), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_half_precision_gives_float32_scores(files: Files, scorer: Any, images: Tensor) -> None:
    full = scorer.score(images, PROMPTS)
    for dtype in ("bf16", "fp16"):
        half: Any = load_scorer(_spec(files), "cpu", dtype=dtype)  # type: ignore[arg-type]
        scores = half.score(images, PROMPTS)
        assert scores.dtype == torch.float32 and 0 < (scores - full).abs().max() < 0.15 * full.abs().max()
        assert half.vision.post_layernorm.weight.element_size() == half.text.dtype.itemsize == 2
        assert half.mlp.layers[0].weight.dtype == half.mean.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert scorer.score(images, PROMPTS).dtype == torch.float32


def test_compile_reaches_the_image_tower(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *_, **__: compiled.append(self))
    scorer: Any = load_scorer(_spec(files), "cpu", compile=True)
    assert compiled == [scorer.vision]


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (
        lambda s: s.pop("blip.visual_encoder.blocks.1.attn.qkv.bias"),
        r"1 missing: blip\.visual_encoder\.blocks\.1\.attn\.qkv\.bias",
    ),
    "extra": (lambda s: s.update({"blip.adapter": torch.zeros(1)}), r"1 unexpected: blip\.adapter"),
    "a second head": (
        lambda s: s.update({"mlp.fidelity.layers.0.bias": torch.zeros(1)}),
        r"1 unexpected: mlp\.fidelity\.layers\.0\.bias",
    ),
    "shape": (
        lambda s: s.update({"blip.visual_encoder.pos_embed": torch.zeros(1, 10, 48)}),
        r"blip\.visual_encoder\.pos_embed \[1, 10, 48\] \(expected \[1, 5, 48\]\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_tensors_that_do_not_fit_are_named(case: str, files: Files, tmp_path: Path) -> None:
    state = torch.load(files["pt"])
    BROKEN[case][0](state)
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=BROKEN[case][1]):
        image_reward(
            weights=str(tmp_path / "broken.pt"),
            architecture=str(files["architecture"]),
            tokenizer=str(files["folder"]),
        )


def test_every_tensor_of_the_file_affects_the_score(files: Files) -> None:
    """Every tensor changes the reward, except key biases, which shift all attention logits equally."""
    state = torch.load(files["pt"])
    idle = ("blip.vision_proj.weight", "blip.text_proj.bias", "blip.text_encoder.embeddings.position_ids")
    pixels = _pixels(torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3)))
    scorer = image_reward(weights=str(files["folder"]), architecture=str(files["architecture"]))
    scorer.requires_grad_(True)
    scorer(pixels, ["a red cube"]).sum().backward()
    ours = to_published({k: p.grad for k, p in scorer.named_parameters()})  # type: ignore[misc]
    assert set(ours) | set(idle) == set(state)
    assert [k for k, g in ours.items() if not (k.endswith("key.bias") or g.abs().sum() > 0)] == []


def test_wrong_tokenizers_and_architectures_are_refused(files: Files, tmp_path: Path) -> None:
    weights, folder = str(files["folder"]), str(files["folder"])
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:-1]) + "\n")
    with pytest.raises(
        ValueError, match=r"has the ids \[13, 14\] for \[DEC\] and \[ENC\], but .* last two of its 16 ids"
    ):
        image_reward(weights=weights, architecture=str(files["architecture"]), tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match=r"no tokenizer can be loaded from .*give tokenizer=FOLDER"):
        image_reward(weights=weights, architecture=str(files["architecture"]), tokenizer=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"other\.json' does not exist"):
        image_reward(weights=weights, architecture="other.json")
    vision = {k: x for k, x in VISION.items() if k != "patch_size"} | {"patch": 16}
    with pytest.raises(ValueError, match=r"'vision' needs exactly .*missing: patch_size; unknown: patch"):
        BLIPScorer({**ARCHITECTURE, "vision": vision}, tokenizer=folder)
    with pytest.raises(ValueError, match="'context_length' must not exceed"):
        BLIPScorer({**ARCHITECTURE, "context_length": 513}, tokenizer=folder)
    with pytest.raises(FileNotFoundError, match=r"no 'model\.safetensors' in the folder"):
        image_reward(weights=str(tmp_path), architecture=str(files["architecture"]), tokenizer=folder)


def test_pillow_images_and_files_give_the_scores_of_their_tensors(scorer: Any, images: Tensor, tmp_path: Path) -> None:
    pictures: list[Any] = [to_pil_image(x) for x in images]
    pictures[1].save(tmp_path / "one.png")
    pictures[1] = tmp_path / "one.png"
    scores = scorer.score_images(pictures, PROMPTS, batch_size=2)
    torch.testing.assert_close(scores, scorer.score(images, PROMPTS), atol=1e-4, rtol=1e-5)


def test_what_save_writes_is_the_published_layout(scorer: Any, files: Files, images: Tensor, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    scorer.save(tmp_path)
    state, published = load_file(tmp_path / "model.safetensors"), torch.load(files["pt"])
    idle = {"blip.vision_proj.weight", "blip.text_proj.bias", "blip.text_encoder.embeddings.position_ids"}
    assert state.keys() == published.keys() - idle
    assert all(torch.equal(x, published[k]) for k, x in state.items())


def test_an_image_reward_checkpoint_is_a_vp_score(files: Files, scorer: Any, images: Tensor) -> None:
    spec = f"{_spec(files, 'vp_score')},mean={MEAN},std={STD}"
    again: Any = load_scorer(spec, "cpu")
    assert torch.equal(again.score(images, PROMPTS), scorer.score(images, PROMPTS))
    raw: Any = load_scorer(_spec(files, "vp_score"), "cpu")
    assert raw.unit == "reward" and torch.equal(raw.score(images, PROMPTS), raw(raw.preprocess(images), PROMPTS))
    with pytest.raises(ValueError, match="needs both mean and std"):
        vp_score(weights=str(files["folder"]), architecture=str(files["architecture"]), mean=1.0)


def test_published_numbers_on_the_real_weights() -> None:
    """The four images and scores of the authors' README, to 0.001."""
    folder = os.environ.get("DIFFALIGN_IMAGE_REWARD")
    if not folder:
        pytest.skip(
            "needs DIFFALIGN_IMAGE_REWARD=FOLDER with ImageReward.pt (hub THUDM/ImageReward), vocab.txt or "
            "tokenizer.json of bert-base-uncased, and 1.webp to 4.webp (assets/images of the authors' repository)"
        )
    prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
    pictures = [Image.open(Path(folder) / f"{i}.webp") for i in (1, 2, 3, 4)]
    scores = image_reward(weights=folder).score_images(pictures, [prompt] * 4)
    expected = torch.tensor([0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492])
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=0)
