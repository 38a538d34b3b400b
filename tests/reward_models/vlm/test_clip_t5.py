"""VQAScore by CLIP-FlanT5 on tiny real classes in the published key layout, against stock T5 and CLIP."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_vlm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

from reward_models import load_scorer
from reward_models.vlm.clip_t5 import answer_probability

LEVELS = torch.randint(0, 256, (2, 3, 40, 61), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
PROMPTS = ["a red fox", "two cats, one <image> dog<|im_end|> {x} and a long wooden table"]
Made = tuple[Path, T5ForConditionalGeneration, CLIPVisionModel]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("clip_t5")
    words = tiny_vlm.tokenizer()
    end = words.eos_token_id
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", end)]
    )
    words.save_pretrained(folder / "words")
    shape: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    ids = {"pad_token_id": words.pad_token_id, "decoder_start_token_id": words.pad_token_id, "eos_token_id": end}
    config = T5Config(vocab_size=len(words), feed_forward_proj="gated-gelu", tie_word_embeddings=False, **shape, **ids)
    t5 = T5ForConditionalGeneration(config).eval()
    t5.lm_head.weight = torch.nn.Parameter(torch.empty(len(words), 32))  # FlanT5's is not that of the embedding
    image = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower = CLIPVisionModel(CLIPVisionConfig(**image, image_size=28, patch_size=14)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in [*t5.parameters(), *tower.parameters()]:
            parameter.normal_(0, 0.2, generator=generator)
    tower.save_pretrained(folder / "tower")
    state = {name: x for name, x in t5.state_dict().items() if "embed_tokens" not in name}
    for k, size in ((0, 16), (2, 32)):
        state[f"mm_projector.{k}.weight"] = torch.randn(32, size, generator=generator) / 3
        state[f"mm_projector.{k}.bias"] = torch.randn(32, generator=generator)
    state["vision_tower.vision_tower.vision_model.post_layernorm.weight"] = torch.ones(16)
    save_file({name: x.contiguous() for name, x in state.items()}, folder / "model.safetensors", {"format": "pt"})
    published = config.to_dict() | {"model_type": "clip_t5", "mm_hidden_size": 16, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(published))
    return folder, t5, tower


def _spec(folder: Path) -> str:
    return f"vqascore_t5,model={folder},tower={folder}/tower,tokenizer={folder}/words"


@torch.no_grad()
def test_vqascore_t5_is_the_likelihood_of_yes_by_stock_classes(made: Made) -> None:
    folder, t5, tower = made
    scorer: Any = load_scorer(_spec(folder), "cpu")
    scores = scorer.score(LEVELS / 255, PROMPTS)
    projector = load_file(folder / "model.safetensors")
    for k, prompt in enumerate(PROMPTS):
        square = Image.new("RGB", (61, 61), (122, 116, 104))
        square.paste(to_pil_image(LEVELS[k]), (0, 10))
        resized = square.resize((28, 28), Image.Resampling.BICUBIC)
        pixels = CLIPImageProcessor(do_resize=False, do_center_crop=False)(resized, return_tensors="pt")["pixel_values"]
        x = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert x.shape[1] == 4
        x = F.linear(x, projector["mm_projector.0.weight"], projector["mm_projector.0.bias"])
        x = F.linear(F.gelu(x), projector["mm_projector.2.weight"], projector["mm_projector.2.bias"])
        shown = prompt.replace("<image>", "< image>").replace("<|im", "< |im")
        texts = (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: ",
            f'\nDoes this figure show "{shown}"? Please answer yes or no. ASSISTANT: ',
        )
        before, after = (scorer.tokenizer(text, return_tensors="pt")["input_ids"] for text in texts)
        assert before[0, -1] == after[0, -1] == t5.config.eos_token_id  # an end token before the image too
        inputs = torch.cat([t5.shared(before), x, t5.shared(after)], 1)
        labels = scorer.tokenizer("Yes", return_tensors="pt")["input_ids"]
        assert labels.shape == (1, 2)
        expected = math.exp(-t5(inputs_embeds=inputs, labels=labels).loss.item())
        assert scores[k].item() == pytest.approx(expected, rel=1e-5)
    assert scores.min() > 0 and scores.max() < 1 and scores[0] != scores[1]
    assert scorer.record["model"] == str(folder)
    assert not torch.equal(scorer.network.lm_head.weight, scorer.network.shared.weight)


def test_the_answer_is_the_geometric_mean_of_its_tokens() -> None:
    """sqrt(0.81 * 0.99) = 0.895489, for each sample."""
    p = torch.tensor([[[0.81, 0.19], [0.01, 0.99]], [[0.25, 0.75], [0.0001, 0.9999]]])
    found = answer_probability(p.log(), torch.tensor([[0, 1], [0, 1]]))
    assert found.tolist() == pytest.approx([0.895489, 0.499975], abs=1e-6)


def test_the_gradient_of_vqascore_t5_reaches_every_image(made: Made) -> None:
    scorer = load_scorer(_spec(made[0]), "cpu")
    images = (LEVELS / 255).requires_grad_()
    scorer.score(images, PROMPTS).sum().backward()
    assert images.grad is not None and (images.grad.flatten(1).abs().sum(1) > 0).all()


def test_a_checkpoint_without_the_projector_is_refused(made: Made, tmp_path: Path) -> None:
    state = {name: x for name, x in load_file(made[0] / "model.safetensors").items() if "mm_projector.2" not in name}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((made[0] / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"lacks 2 tensors of CLIP-FlanT5, such as mm_projector\.2\.bias"):
        load_scorer(_spec(made[0]).replace(f"model={made[0]}", f"model={tmp_path}"), "cpu")


def test_damaged_folders_are_named_and_nothing_in_them_runs(made: Made, tmp_path: Path) -> None:
    """Pickled objects, a damaged pickle, weights of another config and a tokenizer without content."""
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    for k, said in enumerate(("which can run code", "tower|T5", "other shapes", "no tokenizer")):
        shutil.copytree(made[0], folder := tmp_path / str(k))
        if k < 2:
            (folder / "model.safetensors").unlink()
            torch.save({"weight": Code()}, folder / "pytorch_model.bin")
        if k == 1:
            (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:200])
        if k == 2:
            (folder / "config.json").write_text("{}")
        if k == 3:
            (folder / "words" / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match=said) as caught:
            load_scorer(_spec(folder), "cpu")
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not ran.exists()
