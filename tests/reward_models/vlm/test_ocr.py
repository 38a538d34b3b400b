"""The ocr scorer: the published goldens of its measure, and the text that a tiny GOT-OCR2 of transformers generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_vlm
import torch
from torchvision.transforms.functional import to_pil_image
from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration, GotOcr2ImageProcessor, GotOcr2Processor

from reward_models import load_scorer
from reward_models.protocol import Unscored
from reward_models.vlm.ocr import likeness, quoted

LEVELS = torch.randint(0, 256, (2, 3, 40, 60), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LEVELS[1] //= 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("got_ocr2")
    words = tiny_vlm.tokenizer()
    words.add_tokens(["<img>", "</img>", "<imgpad>"], special_tokens=True)
    text: dict[str, Any] = {"model_type": "qwen2", "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    # 64 x 64 patches become 256 image tokens, the processor's number.
    vision: dict[str, Any] = {"hidden_size": 8, "output_channels": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"image_size": 64, "patch_size": 1, "window_size": 8, "global_attn_indexes": [], "mlp_dim": 8}
    token = words.convert_tokens_to_ids("<imgpad>")
    config = GotOcr2Config(text_config=text, vision_config=vision, image_token_index=token, image_seq_length=256)
    network = GotOcr2ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            # Small embeddings: what is said depends on the image.
            parameter.normal_(0, 0.02 if "embed_tokens" in name else 0.5, generator=generator)
    network.generation_config.pad_token_id = words.pad_token_id
    network.save_pretrained(path)
    GotOcr2Processor(GotOcr2ImageProcessor(size={"height": 64, "width": 64}), words).save_pretrained(path)
    return path


def test_what_is_read_is_the_greedy_text_of_the_stock_model(folder: Path) -> None:
    scorer: Any = load_scorer(f"ocr,model={folder},max_new_tokens=8", "cpu")
    network = GotOcr2ForConditionalGeneration.from_pretrained(folder).eval()
    found = scorer.read(LEVELS / 255)
    for picture, text in zip(map(to_pil_image, LEVELS), found, strict=True):
        inputs = scorer.processor(picture, return_tensors="pt")
        inputs.pop("token_type_ids", None)  # of the tiny tokenizer in transformers 4
        prompt = scorer.processor.tokenizer.decode(inputs["input_ids"][0])
        assert prompt.endswith("</img>\n OCR: <|im_end|><|im_start|>assistant\n")
        out = network.generate(**inputs, do_sample=False, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
        assert text == scorer.processor.tokenizer.decode(out[0], skip_special_tokens=True)
    assert all(found) and found[0] != found[1]
    assert not scorer.differentiable and scorer.record["model"] == str(folder)
    letters = "".join(found[0].lower().split())
    scores = scorer.score(LEVELS / 255, [f'a sign "{letters}"', 'a sign "' + "\N{SNOWMAN}" * 40 + '"'])
    assert scores.tolist() == [1, 0] and scores.dtype == torch.float32


def test_a_prompt_without_quotes_has_no_score(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer: Any = load_scorer(f"ocr,model={folder}", "cpu")
    monkeypatch.setattr(type(scorer), "read", lambda self, images: ["helo world"] * len(images))
    with pytest.raises(Unscored, match='image 1: the prompt has no text in double quotes: "a sign"') as caught:
        scorer.score(LEVELS / 255, ['a sign "Hello World"', "a sign"])
    assert caught.value.scores[0].item() == pytest.approx(0.9) and caught.value.scores[1].isnan()


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Hello World", 1),
        ("helo world", 0.9),
        ("xx hello world yy", 1),
        ("hello", 0.5),
        ("", 0),
        ("HELLO W0RLD and more words here", 0),
    ],
)
def test_the_measure_is_that_of_online_rl(text: str, score: float) -> None:
    assert likeness("Hello World", text) == pytest.approx(score)


def test_the_target_is_in_the_first_double_quotes() -> None:
    assert quoted('a sign that says "Hello World" and "no"') == "Hello World"
    assert quoted("it's 'single'") == quoted('one " only') == quoted('""') == ""
    with pytest.raises(ValueError, match="the target must have a letter"):
        likeness(" ", "x")


def test_a_folder_without_some_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    """transformers would draw them at random."""
    part = tiny_vlm.without_a_tensor(folder, tmp_path / "part")
    with pytest.raises(ValueError, match="lacks 1 tensors of GOT-OCR2"):
        load_scorer(f"ocr,model={part}", "cpu")
