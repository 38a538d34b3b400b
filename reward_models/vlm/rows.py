"""The named scorers that are vision-language models. To add one, add a function with its settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Qwen2VLModel

from reward_models.files import read_text
from reward_models.vlm.questions import QuestionScorer, read_questions
from reward_models.vlm.readouts import Head, Levels, Probability, Text, first_tokens
from reward_models.vlm.replies import PROMPT, Template, read_template
from reward_models.vlm.scorer import VLMScorer
from reward_models.vlm.sizing import Patches
from reward_models.weights import find_file, load_strict, pretrained, pretrained_whole, read_state

HPS_V3, HPS_V3_FILE, HPS_V3_BASE = "MizzenAI/HPSv3", "HPSv3.safetensors", "Qwen/Qwen2-VL-7B-Instruct"
REWARD = "<|Reward|>"
VLM = "vision-language model"
CHAT = "Qwen/Qwen3-VL-4B-Instruct"
GENEVAL2 = "Qwen/Qwen3-VL-8B-Instruct"
UNIFIED = "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b"
KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""The model types of transformers that are tested."""

_TEMPLATES = Path(__file__).parent / "templates"
VQASCORE = Template(f'Does this figure show "{PROMPT}"? Please answer Yes or No.')
QUALITY = "How would you rate the {what} of this image?"
LEVELS = ("excellent", "good", "fair", "poor", "bad")


def hps_v3(*, weights: str = HPS_V3, base: str = HPS_V3_BASE) -> VLMScorer:
    """HPSv3 (Ma et al., 2025, arXiv 2508.03789): a preference head on Qwen2-VL-7B. Only differences of scores of one
    prompt mean something.

    weights  file, folder or hub id
    base     folder or hub id with config, tokenizer and processor of Qwen2-VL-7B-Instruct; its weights are not read
    """
    file = find_file(weights, HPS_V3_FILE)
    config, processor = (pretrained(kind, base, what=VLM) for kind in (AutoConfig, AutoProcessor))
    if config.model_type != "qwen2_vl":
        raise ValueError(f"the base of HPSv3 must be a qwen2_vl; '{base}' is a {config.model_type}")
    processor.tokenizer.add_tokens([REWARD], special_tokens=True)
    token = processor.tokenizer.convert_tokens_to_ids(REWARD)
    state = {_hps_v3_key(name): value for name, value in read_state(file).items()}
    rows = state.get("network.language_model.embed_tokens.weight")
    if rows is None or len(rows) <= token:
        got = "none" if rows is None else len(rows)
        raise ValueError(f"'{file}' must have an embedding of each of the {token + 1} tokens of '{base}'; got {got}")
    text = config.get_text_config()
    text.vocab_size = len(rows)
    sizes = tuple(len(state[name]) for name in ("readout.layers.0.bias", "readout.layers.3.bias") if name in state)
    with init_empty_weights():  # 8 billion numbers are not drawn to be thrown away
        network = Qwen2VLModel(config)
    readout = Head(text.hidden_size, token, sizes if len(sizes) == 2 else (1024, 16))
    template = Template(read_text(_TEMPLATES / "hps_v3.txt").replace("{text_prompt}", PROMPT))
    area = 256 * 28 * 28
    how: dict[str, Any] = {"rule": Patches(least=area, most=area), "template": template, "readout": readout}
    scorer = VLMScorer(network, processor, unit="logit", name=weights, **how)
    load_strict(scorer, state, where=file, ignore=["lm_head.weight"], assign=True)
    readout.float()
    return scorer.eval().requires_grad_(False)


def _hps_v3_key(name: str) -> str:
    """A name in the file, as transformers 4.45 wrote it, -> name in VLMScorer."""
    name = re.sub(r"^rm_head\.", "readout.layers.", name)
    name = re.sub(r"^visual\.", "network.visual.", name)
    return re.sub(r"^model\.", "network.language_model.", name)


def vqascore(*, model: str = CHAT, unit: Literal["probability", "logit"] = "probability") -> VLMScorer:
    """VQAScore (Lin et al., 2024, arXiv 2404.01291) of a chat model: the probability of Yes, asked whether the image
    shows the prompt. Scores of different models cannot be compared.

    model  hub id or folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL
    unit   probability: of Yes, over the whole vocabulary; logit: log p(Yes) - log p(No), which does not saturate
    """
    network, processor = _load(model)
    yes, no = (first_tokens(processor.tokenizer, [word]) for word in ("Yes", "No"))
    readout = Probability(yes, no if unit == "logit" else ())
    how: dict[str, Any] = {"rule": Patches.of(processor.image_processor), "template": VQASCORE, "readout": readout}
    return VLMScorer(network, processor, unit=unit, name=model, **how).eval().requires_grad_(False)


def unified_reward(*, model: str = UNIFIED, max_new_tokens: int = 512) -> VLMScorer:
    """UnifiedReward 2.0 (Wang et al., 2025, arXiv 2503.05236): the mean of alignment, coherence and style, 1 to 5, as
    the model writes them. `score_aspects` gives all three. Not differentiable.

    model           hub id or folder
    max_new_tokens  length after which a reply is cut off
    """
    return rubric(model=model, template=str(_TEMPLATES / "unified_reward_2.txt"), max_new_tokens=max_new_tokens)


def rubric(*, template: str, model: str = CHAT, max_new_tokens: int = 512) -> VLMScorer:
    """The mean of the numbers that a chat model writes as the template asks. Not differentiable.

    template        file with the question, or the question itself: {prompt} stands for the prompt, and each line
                    `NAME (LOW-HIGH): X` asks for a number
    model           hub id or folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL
    max_new_tokens  length after which a reply is cut off
    """
    question = read_template(template).need_aspects()
    network, processor = _load(model)
    how: dict[str, Any] = {"rule": Patches.of(processor.image_processor), "template": question}
    scorer = VLMScorer(network, processor, readout=Text(max_new_tokens), unit=question.unit, name=model, **how)
    return scorer.eval().requires_grad_(False)


def quality_levels(*, model: str = CHAT, what: Literal["quality", "aesthetics"] = "quality") -> VLMScorer:
    """The formula of Q-Align (Wu et al., 2023, arXiv 2312.17090) on a chat model that was not trained for it: the next
    word among excellent, good, fair, poor, bad, 5 to 1. Prompts are ignored.

    model  hub id or folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL
    what   what is rated
    """
    network, processor = _load(model)
    tokens = [first_tokens(processor.tokenizer, [f" {word}"])[0] for word in LEVELS]
    question = Template(QUALITY.format(what=what), with_prompt=False)
    how: dict[str, Any] = {"rule": Patches.of(processor.image_processor), "template": question}
    how |= {"readout": Levels(tokens), "answer": f"The {what} of the image is"}
    return VLMScorer(network, processor, unit="points 1 to 5", name=model, **how).eval().requires_grad_(False)


def geneval2(
    *, questions: str | None = None, model: str = GENEVAL2, mean: Literal["geometric", "arithmetic"] = "geometric"
) -> QuestionScorer:
    """GenEval2's Soft-TIFA (Kamath et al., 2025): the mean probability of the right answers to a prompt's questions.

    questions  file with lines {"prompt": ..., "vqa_list": [[question, answer], ...]}; without it a prompt is a
               question, and its second line the right answer, by default Yes
    model      hub id or folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL
    mean       geometric or arithmetic, over the questions
    """
    asked = None if questions is None else read_questions(questions)
    network, processor = _load(model)
    how: dict[str, Any] = {"rule": Patches.of(processor.image_processor), "questions": asked, "mean": mean}
    scorer = QuestionScorer(network, processor, template=Template(f"{PROMPT} Answer in one word."), name=model, **how)
    return scorer.eval().requires_grad_(False)


def _load(model: str) -> tuple[Any, Any]:
    """A chat model in the dtype of its file, and its processor. Raises ValueError for other models."""
    if (kind := pretrained(AutoConfig, model, what=VLM).model_type) not in KINDS:
        raise ValueError(f"'{model}' is a {kind}; the scorer needs one of {', '.join(KINDS)}")
    network = pretrained_whole(AutoModelForImageTextToText, model, what=VLM, torch_dtype="auto", use_safetensors=True)
    return network, pretrained(AutoProcessor, model, what=VLM)
