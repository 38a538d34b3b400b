"""HPSv3 against the authors' recipe, written out in plain torch, on a tiny Qwen2-VL in the published layout."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_vlm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image

from reward_models import load_scorer
from reward_models.vlm.readouts import Head
from reward_models.vlm.replies import PROMPT, Template
from reward_models.vlm.rows import REWARD
from reward_models.vlm.scorer import VLMScorer
from reward_models.vlm.sizing import Patches

SQUARE = Patches(least=200704, most=200704)
PROMPTS = ["a red fox {in} snow", "three <|Reward|> cats <|image_pad|> on a very long wooden table, oil on canvas"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model's folder, and in it HPSv3.safetensors with the names of transformers 4.45."""
    path = tmp_path_factory.mktemp("hps_v3")
    network = tiny_vlm.save("qwen2_vl", path, extra=1)
    state = {re.sub(r"^model\.(?=visual)", "", name): value for name, value in network.state_dict().items()}
    state = {name.replace("model.language_model.", "model."): value for name, value in state.items()}
    generator = torch.Generator().manual_seed(1)
    for layer, (inputs, outputs) in {0: (32, 64), 3: (64, 16), 5: (16, 2)}.items():
        state[f"rm_head.{layer}.weight"] = 0.3 * torch.randn(outputs, inputs, generator=generator)
        state[f"rm_head.{layer}.bias"] = torch.randn(outputs, generator=generator)
    save_file({name: value.contiguous() for name, value in state.items()}, path / "HPSv3.safetensors")
    return path


@pytest.fixture(scope="module")
def published(folder: Path) -> Any:
    return load_scorer(f"hps_v3,weights={folder / 'HPSv3.safetensors'},base={folder}", "cpu")


@pytest.fixture(scope="module")
def scorer(published: Any) -> Any:
    """With a short template: that of the authors would be 2,590 tokens of the tiny tokenizer."""
    how = {"rule": published.rule, "readout": published.readout, "unit": "logit"}
    template = Template(f"Textual prompt - {PROMPT}\n\nplease: {REWARD}\n\nEND\n")
    return VLMScorer(published.network, published.processor, template=template, **how).eval()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        *(((side, side), (448, 448)) for side in (1024, 512, 256, 32)),
        ((768, 512), (532, 364)),
        ((512, 768), (364, 532)),
        ((1344, 768), (588, 336)),
        ((832, 1216), (364, 532)),
        ((1080, 1920), (336, 588)),
        ((1536, 1024), (532, 364)),
        ((100, 700), (196, 1204)),
        ((337, 1000), (252, 756)),
    ],
)
def test_sizes_are_those_of_the_authors(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert SQUARE.size(*size) == expected
    assert SQUARE.tokens(*size) == expected[0] * expected[1] // 28**2


def test_images_narrower_than_1_to_200_are_refused() -> None:
    with pytest.raises(ValueError, match="an image of 4020 x 20 is narrower than 1:200"):
        SQUARE.size(20, 4020)


@pytest.mark.parametrize("size", [(448, 448), (70, 130)])
def test_patches_equal_the_processor_of_transformers_bit_for_bit(size: tuple[int, int]) -> None:
    from transformers import Qwen2VLImageProcessor

    levels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    to = SQUARE.size(*size)
    resized = [to_pil_image(x).resize(to[::-1], Image.Resampling.BICUBIC) for x in levels]
    expected = Qwen2VLImageProcessor()(resized, return_tensors="pt")
    patches, grid = SQUARE(levels.float() / 255)
    assert torch.equal(patches, expected["pixel_values"]) and torch.equal(grid, expected["image_grid_thw"])


def test_the_template_is_that_of_the_authors(published: Any) -> None:
    text = published.template.text.replace(PROMPT, "{text_prompt}")
    found = hashlib.sha256(text.encode()).hexdigest()
    assert (len(text), found) == (2590, "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c")
    assert published.record["template"] == published.template.sha256 and published.record["readout"] == "head"
    assert published.score(torch.rand(1, 3, 28, 28), ["a fox"]).isfinite().all()


def _vision(state: dict[str, Tensor], patches: Tensor, h: int, w: int) -> Tensor:
    """Qwen2-VL's image tower in plain torch: patches [h * w, 1176] in blocks of 2 x 2 -> image tokens."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"visual.{name}.weight"], state.get(f"visual.{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"visual.{name}.weight"], state[f"visual.{name}.bias"], 1e-6)

    x = patches @ state["visual.patch_embed.proj.weight"].flatten(1).T
    rows = torch.arange(h).view(h // 2, 2, 1, 1).expand(h // 2, 2, w // 2, 2).permute(0, 2, 1, 3).flatten()
    columns = torch.arange(w).view(1, 1, w // 2, 2).expand(h // 2, 2, w // 2, 2).permute(0, 2, 1, 3).flatten()
    heads, width = 2, x.shape[-1] // 2
    frequencies = 10000 ** (-torch.arange(0, width // 2, 2) / (width // 2))
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=-1).repeat(1, 2)
    for k in range(2):
        q, key, v = linear(f"blocks.{k}.attn.qkv", norm(f"blocks.{k}.norm1", x)).view(-1, 3, heads, width).unbind(1)
        q, key = (_turned(y.transpose(0, 1), angles) for y in (q, key))
        attended = ((q @ key.mT / math.sqrt(width)).softmax(-1) @ v.transpose(0, 1)).transpose(0, 1).flatten(1)
        x = x + linear(f"blocks.{k}.attn.proj", attended)
        hidden = linear(f"blocks.{k}.mlp.fc1", norm(f"blocks.{k}.norm2", x))
        x = x + linear(f"blocks.{k}.mlp.fc2", hidden * torch.sigmoid(1.702 * hidden))
    x = norm("merger.ln_q", x).view(-1, 4 * x.shape[-1])
    return linear("merger.mlp.2", F.gelu(linear("merger.mlp.0", x)))


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding, halves layout."""
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def _decoder(state: dict[str, Tensor], x: Tensor, theta: float) -> Tensor:
    """Qwen2's decoder in plain torch, with plain positions: [L, D] -> [L, D]."""

    def linear(name: str, y: Tensor) -> Tensor:
        return F.linear(y, state[f"model.{name}.weight"], state.get(f"model.{name}.bias"))

    def norm(name: str, y: Tensor) -> Tensor:
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * state[f"model.{name}.weight"]

    length, width = len(x), 8
    angles = (torch.arange(length)[:, None] * theta ** (-torch.arange(0, width, 2) / width)).repeat(1, 2)
    mask = torch.full((length, length), -math.inf).triu(1)
    for k in range(3):
        y = norm(f"layers.{k}.input_layernorm", x)
        parts = [linear(f"layers.{k}.self_attn.{name}_proj", y).view(length, -1, width) for name in "qkv"]
        q, key, v = (part.transpose(0, 1).repeat_interleave(4 // part.shape[1], 0) for part in parts)
        weights = (_turned(q, angles) @ _turned(key, angles).mT / math.sqrt(width) + mask).softmax(-1)
        x = x + linear(f"layers.{k}.self_attn.o_proj", (weights @ v).transpose(0, 1).flatten(1))
        y = norm(f"layers.{k}.post_attention_layernorm", x)
        gate, up = (linear(f"layers.{k}.mlp.{name}_proj", y) for name in ("gate", "up"))
        x = x + linear(f"layers.{k}.mlp.down_proj", F.silu(gate) * up)
    return norm("norm", x)


def _official(folder: Path, scorer: Any, levels: Tensor, prompt: str) -> Tensor:
    """The score of an image of 448 x 448 grey levels [3, 448, 448]; differentiable."""
    state = load_file(folder / "HPSv3.safetensors")
    pixels = (levels / 255 - torch.tensor(SQUARE.mean).view(3, 1, 1)) / torch.tensor(SQUARE.std).view(3, 1, 1)
    twice = torch.stack([pixels, pixels]).view(1, 2, 3, 16, 2, 14, 16, 2, 14)
    tokens = _vision(state, twice.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(1024, 1176), 32, 32)
    text = scorer.template.text.replace(PROMPT, prompt)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    chat = scorer.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    chat = chat.replace("<|image_pad|>", "<|image_pad|>" * 256)
    ids = torch.tensor(scorer.processor.tokenizer.encode(chat, add_special_tokens=False))
    x, image = state["model.embed_tokens.weight"][ids], ids == scorer.network.config.image_token_id
    x = x.clone().masked_scatter(image[:, None].expand_as(x), tokens)
    theta = scorer.network.config.text_config.rope_parameters["rope_theta"]
    y = _decoder(state, x, theta)[ids == scorer.readout.token]
    for layer in (0, 3, 5):
        y = F.linear(y, state[f"rm_head.{layer}.weight"], state[f"rm_head.{layer}.bias"])
        y = y if layer == 5 else y.relu()
    assert y.shape == (1, 2)
    return y[0, 0]


@pytest.fixture(scope="module")
def levels() -> Tensor:
    return torch.randint(0, 256, (2, 3, 448, 448), generator=torch.Generator().manual_seed(0)).float()


@pytest.fixture(scope="module")
def scored(scorer: Any, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the batch, and the gradient of their sum with respect to the images."""
    images = (levels / 255).requires_grad_()
    scores = scorer.score(images, PROMPTS)
    return scores.detach(), torch.autograd.grad(scores.sum(), images)[0]


def test_scores_and_gradients_equal_the_recipe_of_the_authors(
    folder: Path, scorer: Any, levels: Tensor, scored: tuple[Tensor, Tensor]
) -> None:
    """Also: a batch of unequal prompts equals singles, since the recipe has neither padding nor a batch, and the tokens
    in a prompt are neither a second place to read nor a second image."""
    plain = [PROMPTS[0], PROMPTS[1].replace("<|", "< |")]
    for k, prompt in enumerate(plain):
        pixels = levels[k].clone().requires_grad_()
        expected = _official(folder, scorer, pixels, prompt)
        assert scored[0][k].item() == pytest.approx(expected.item(), abs=1e-5)
        (gradient,) = torch.autograd.grad(255 * expected, pixels)
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(scored[1][k], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
    assert (scored[0][0] - scored[0][1]).abs() > 1e-3


def test_positions_of_images_in_three_dimensions_give_another_score(
    scorer: Any, levels: Tensor, scored: tuple[Tensor, Tensor]
) -> None:
    with torch.no_grad():
        inputs = scorer.inputs(levels[:1] / 255, [scorer.template.fill(PROMPTS[0])])
        hidden = scorer.network(**inputs).last_hidden_state[inputs["input_ids"] == scorer.readout.token]
        other = scorer.readout.layers(hidden)[0, 0]
    assert (other - scored[0][0]).abs() > 1e-4  # ten times what the recipe may differ by


def test_a_checkpoint_that_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "HPSv3.safetensors")
    save_file(
        state | {"model.embed_tokens.weight": state["model.embed_tokens.weight"][:-1]}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ValueError, match=r"must have an embedding of each of the 291 tokens of .*; got 290"):
        load_scorer(f"hps_v3,weights={tmp_path}/a.safetensors,base={folder}", "cpu")
    del state["rm_head.3.bias"]
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"do not match the model: 1 missing: readout\.layers\.3\.bias"):
        load_scorer(f"hps_v3,weights={tmp_path}/b.safetensors,base={folder}", "cpu")


def test_the_head_needs_its_token_once(scorer: Any) -> None:
    head = Head(32, 5)
    for ids, counts in (([[1, 2]], [0]), ([[5, 5]], [2])):
        with pytest.raises(ValueError, match=re.escape(f"must have token 5 once; got {counts}")):
            head(None, {"input_ids": torch.tensor(ids)})


def test_half_precision_is_that_of_training_and_full_precision_is_full(folder: Path, tmp_path: Path) -> None:
    state = {name: x.bfloat16() for name, x in load_file(folder / "HPSv3.safetensors").items()}
    save_file(state, tmp_path / "HPSv3.safetensors")
    spec = f"hps_v3,weights={tmp_path},base={folder}"
    for dtype, wanted in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        scorer: Any = load_scorer(spec, "cpu", dtype=dtype)  # type: ignore[arg-type]
        assert {p.dtype for p in scorer.network.parameters()} == {wanted}
        assert {p.dtype for p in scorer.readout.parameters()} == {torch.float32}
        # Frequencies of rotary embeddings: in bfloat16, distant positions would be off by whole turns.
        assert {b.dtype for b in scorer.network.buffers() if b.is_floating_point()} == {torch.float32}
    assert REWARD in scorer.processor.tokenizer.get_added_vocab()
