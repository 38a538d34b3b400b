"""Q-SiT on a tiny LLaVA-OneVision, against the recipe of its model card with transformers' processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_vlm
import torch
import transformers
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from reward_models import load_scorer

# Images are rendered first, as in the released template.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PILLOW = getattr(transformers, "LlavaOnevisionImageProcessorPil", transformers.LlavaOnevisionImageProcessor)
SIZES = [(40, 60), (61, 20), (28, 28), (100, 97)]


def _levels(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("q_sit")
    words = tiny_vlm.tokenizer()
    words.add_tokens(["<image>", "<video>"], special_tokens=True)
    text: dict[str, Any] = {"model_type": "qwen2", "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    vision: dict[str, Any] = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    token, video = (words.convert_tokens_to_ids(f"<{name}>") for name in ("image", "video"))
    grid = [[28 * h, 28 * w] for h in (1, 2) for w in (1, 2)]
    ids = {"image_token_index": token, "video_token_index": video, "image_grid_pinpoints": grid}
    network = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(text_config=text, vision_config={**vision, "vision_use_head": False}, **ids)
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    network.save_pretrained(path)
    images = transformers.LlavaOnevisionImageProcessor(size={"height": 28, "width": 28}, image_grid_pinpoints=grid)
    videos = transformers.LlavaOnevisionVideoProcessor()
    how: dict[str, Any] = {"num_image_tokens": 4, "vision_feature_select_strategy": "full", "chat_template": CHAT}
    LlavaOnevisionProcessor(images, words, videos, **how).save_pretrained(path)
    return path


@torch.no_grad()
def test_q_sit_is_the_recipe_of_its_card(folder: Path) -> None:
    scorer: Any = load_scorer(f"q_sit,model={folder}", "cpu")
    network = LlavaOnevisionForConditionalGeneration.from_pretrained(folder).eval()
    processor = scorer.processor
    rule = processor.image_processor
    pillow = PILLOW(size={"height": 28, "width": 28}, image_grid_pinpoints=rule.image_grid_pinpoints)
    assert processor.tokenizer.decode(scorer.tokens(40, 60)[0]).endswith(
        "\nAssume you are an image quality evaluator. \nYour rating should be chosen from the following five "
        "categories: Excellent, Good, Fair, Poor, and Bad (from high to low). \nHow would you rate the quality of this "
        "image?<|im_end|><|im_start|>assistant\nThe quality of this image is "
    )
    for size in SIZES:
        levels = _levels(*size)
        scores = scorer.score(levels / 255, [""] * 2)
        for image, score, crops in zip(levels, scores, scorer.crops(levels / 255), strict=True):
            inputs: Any = {"input_ids": scorer.tokens(*size), "image_sizes": torch.tensor([size])}
            inputs |= {"pixel_values": pillow(to_pil_image(image), return_tensors="pt")["pixel_values"]}
            torch.testing.assert_close(crops[None], inputs["pixel_values"], rtol=0, atol=1e-5)
            out = network.generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
            letters = [processor.tokenizer.convert_tokens_to_ids(x) for x in "EGFPB"]  # first tokens of the words
            p = F.softmax(out.logits[-1][0, letters], -1)
            expected = sum(w * x for w, x in zip((1, 0.75, 0.5, 0.25, 0), p.tolist(), strict=True))
            assert score.item() == pytest.approx(expected, abs=1e-5)
        assert scores[0] != scores[1]


def test_the_gradient_of_q_sit_reaches_every_image(folder: Path) -> None:
    scorer = load_scorer(f"q_sit,model={folder}", "cpu")
    images = (_levels(40, 60) / 255).requires_grad_()
    scorer.score(images, [""] * 2).sum().backward()
    assert images.grad is not None and (images.grad.flatten(1).abs().sum(1) > 0).all()
