"""Cards of the scorers that are vision-language models."""

from __future__ import annotations

from reward_models.folder.card import UNKNOWN, Accuracy, Card

_README = "HPSv3 README (tie rule of Pick-a-Pic not stated)"
_IMAGES = (
    "Pillow's bicubic resize to sides that are multiples of a patch pair, {}; cut into patches; exact, differentiable"
)
_CHAT_IMAGES = _IMAGES.format("4 to 16384 image tokens as in qwen-vl-utils")
_CHAT = "any Qwen2-VL, Qwen2.5-VL or Qwen3-VL of transformers; by default Qwen/Qwen3-VL-4B-Instruct from the hub"
_CHAT_LICENCE = "that of the model; Qwen3-VL-4B-Instruct: Apache-2.0"
_PLAIN = "special tokens of the model in a prompt are broken up and become plain text"
_OTHER_MODEL = "scores of different models or templates cannot be compared; both are stored with the results"

VLM_CARDS = {
    "hps_v3": Card(
        "HPSv3 (Ma et al., 2025, arXiv 2508.03789)",
        "hub MizzenAI/HPSv3, HPSv3.safetensors, 16 GB, bf16; config and processor of Qwen/Qwen2-VL-7B-Instruct",
        "code and template MIT; weights Apache-2.0",
        "Qwen2-VL-7B and a head of three layers on the hidden state of one token; 8 billion parameters",
        _IMAGES.format("about 200,704 pixels: 448 x 448 for a square"),
        f"in the authors' template of 2,590 characters; {_PLAIN}",
        "logit: the mean of the predicted score; its predicted spread is not used",
        "-2 to 12; SDXL 8, FLUX.1-dev 10 on the authors' prompts",
        (
            Accuracy("ImageReward test", 66.8, _README),
            Accuracy("Pick-a-Pic test", 72.8, _README),
            Accuracy("HPDv2 test", 85.4, _README),
            Accuracy("HPDv3 test", 76.9, _README),
        ),
        (
            "only differences between images of the same prompt mean something",
            "positions are plain, as in the authors' code; ports with Qwen2-VL's usual ones give other numbers",
            "the authors publish no score of a single image, so the numbers of the released weights are untested here",
        ),
    ),
    "vqascore": Card(
        "VQAScore of a chat model (Lin et al., 2024, arXiv 2404.01291; as t2v_metrics 3.1)",
        _CHAT,
        f"method Apache-2.0; weights: {_CHAT_LICENCE}",
        "the probability of Yes as the next token, asked whether the image shows the prompt",
        _CHAT_IMAGES,
        f'Does this figure show "..."? Please answer Yes or No. {_PLAIN}',
        "probability of Yes over the whole vocabulary; logit: log p(Yes) - log p(No)",
        "near 0 or 1 with strong generators: then use unit=logit",
        (),
        (
            _OTHER_MODEL,
            "models that think before they answer have no such probability",
            "the published CLIP-FlanT5 is another model, and gives other numbers",
        ),
    ),
    "vqascore_t5": Card(
        "VQAScore by CLIP-FlanT5, the published one (Lin et al., 2024, arXiv 2404.01291)",
        "hub zhiqiulin/clip-flant5-xxl (11 billion parameters; model=zhiqiulin/clip-flant5-xl has 3), CLIP of "
        "openai/clip-vit-large-patch14-336, tokenizer of google/flan-t5-xxl",
        "Apache-2.0; OpenAI's CLIP: MIT",
        "T5 reads the question with the 576 patch features of CLIP ViT-L/14; the probability of its answer Yes",
        "padded to a square in CLIP's mean colour, then Pillow's bicubic resize to 336 x 336; exact, differentiable",
        f'Does this figure show "..."? Please answer yes or no. In a chat, in two texts around the image. {_PLAIN}',
        "probability: geometric mean over the tokens Yes and end",
        "0 to 1",
        (),
        (
            "the image tower is OpenAI's; the copy in the checkpoint, said to be frozen, is not read",
            "imscore's port keeps the class token and takes one mean over a batch: other numbers",
            "the numbers of the released weights are untested here",
        ),
    ),
    "unified_reward": Card(
        "UnifiedReward 2.0 (Wang et al., 2025, arXiv 2503.05236)",
        "hub CodeGoat24/UnifiedReward-2.0-qwen3vl-8b",
        "template and code MIT; weights: see the hub",
        "Qwen3-VL-8B that writes three scores, greedily decoded",
        _CHAT_IMAGES.replace("exact, differentiable", "exact; no gradient"),
        f"in the authors' template for generated images; {_PLAIN}",
        "points: mean of alignment, coherence and style; score_aspects gives all three",
        "1 to 5",
        (),
        (
            _OTHER_MODEL,
            "a reply without the three numbers is a failure of that image, with the text; it is never a score",
            "the released weights are untested here",
        ),
    ),
    "rubric": Card(
        "Your own question to a chat model",
        _CHAT,
        _CHAT_LICENCE,
        "the model writes the numbers that the template asks for, greedily decoded",
        _CHAT_IMAGES.replace("exact, differentiable", "exact; no gradient"),
        f"where the template has {{prompt}}; {_PLAIN}",
        "points in the ranges of the template, mean over its lines NAME (LOW-HIGH): X",
        "as the template says",
        (),
        (_OTHER_MODEL, "untested against people: measure it with reward_accuracy before you train with it"),
    ),
    "judge": Card(
        "A model behind a server in the OpenAI chat schema, as a judge",
        "url=http://127.0.0.1:8000/v1,model=NAME of vLLM, SGLang or a hosted model; images leave this machine",
        "that of the model, and the terms of its server",
        "the model writes the numbers that the template asks for, at temperature 0",
        "as PNG, or JPEG of quality 95 (encoding=jpeg), at their own size; no gradient",
        "where the template has {prompt}",
        "points in the ranges of the template, mean over its lines NAME (LOW-HIGH): X",
        "as the template says",
        (),
        (
            _OTHER_MODEL,
            "hosted models change without notice, and servers are not deterministic at temperature 0: the cache keeps "
            "the first answer",
            "pairs: judges prefer a position; both orders are asked, and a judge that decides by position gives 1/2",
        ),
    ),
    "geneval2": Card(
        "Soft-TIFA of GenEval2 (Kamath et al., 2025)",
        "hub Qwen/Qwen3-VL-8B-Instruct; prompts with questions are not shipped: questions=FILE, such as GenEval2's; "
        "without it, a prompt is a question and its answer",
        "weights Apache-2.0; GenEval2's prompts and code CC BY-NC 4.0 (non-commercial), not part of this package",
        "the probability of each right answer as the next token, summed over its spellings, geometric mean",
        _CHAT_IMAGES,
        f"each question, then: Answer in one word. {_PLAIN}",
        "probability",
        "0 to 1",
        (),
        (
            _OTHER_MODEL,
            "a prompt without questions has no score",
            "reads an image once for each question; one wrong answer makes the score small (mean=arithmetic does not)",
        ),
    ),
    "aesthetic_v2.5": Card(
        "Aesthetic Predictor V2.5 (discus0434, 2024)",
        "head aesthetic_predictor_v2_5.pth of GitHub discus0434/aesthetic-predictor-v2-5, to be given as weights=FILE; "
        "SigLIP: hub google/siglip-so400m-patch14-384",
        "head AGPL-3.0, therefore never downloaded by this package; SigLIP Apache-2.0",
        "SigLIP so400m, image tower, and five linear layers without non-linearity",
        "Pillow's bicubic resize to 384 x 384 whatever the aspect; exact, differentiable",
        "not read",
        "points",
        "1 to 10; its author calls 5.5 and more great",
        (),
        (
            "ignores the prompt: as the only reward it drives images away from the prompt",
            "the numbers of the released head are untested here",
        ),
    ),
    "clip_iqa": Card(
        "CLIP-IQA (Wang, Chan, Loy, 2023, arXiv 2207.12396)",
        "OpenAI's CLIP RN50, open_clip's tag openai",
        "OpenAI's CLIP: MIT; the method's own code is S-Lab 1.0 (non-commercial), and is not used",
        "CLIP RN50 without positions in its pooling; softmax over 100 * cosine with `Good photo.` and `Bad photo.`",
        "at their own size; differentiable",
        "not read",
        "probability of the good photo",
        "0 to 1",
        (),
        (
            "ignores the prompt: as the only reward it drives images away from the prompt",
            "pyiqa averages five other pairs of texts under the same name",
            "images of several sizes are scored one size at a time",
        ),
    ),
    "dino_similarity": Card(
        "Similarity to images of a subject by DINOv2 (Oquab et al., 2023, arXiv 2304.07193)",
        "hub facebook/dinov2-base; references=FOLDER with images of the subject",
        "Apache-2.0",
        "DINOv2 ViT-B/14; mean cosine of class tokens with the references",
        "Pillow's bicubic resize of the shorter side to 256, centre crop to 224; exact, differentiable",
        "not read",
        "cosine",
        "-1 to 1",
        (),
        ("measures the subject, not the prompt or the quality: copies of a reference score best",),
    ),
    "ocr": Card(
        "Text accuracy (the measure of Flow-GRPO, arXiv 2505.05470) of what GOT-OCR2 reads (Wei et al., 2024)",
        "hub stepfun-ai/GOT-OCR-2.0-hf, 0.6 billion parameters",
        "Apache-2.0",
        "GOT-OCR2 of transformers, greedily decoded; 1 - Levenshtein distance / length, without case and spaces",
        "by the model's own processor, to 1024 x 1024; no gradient",
        "the text in the first double quotes; a prompt without is a failure",
        "share of the text; 1 if it is part of what is read",
        "0 to 1",
        (),
        (
            "published numbers use PaddleOCR, a detector with a recogniser of lines: others than these",
            "looks at the text only: as the only reward it drives images away from the rest of the prompt",
            "untested on the released weights here",
        ),
    ),
    "q_sit": Card(
        "Q-SiT (Zhang et al., 2025, arXiv 2503.09197)",
        "hub zhangzicheng/q-sit-mini (0.5 billion parameters; model=zhangzicheng/q-sit has 7)",
        "MIT",
        "LLaVA-OneVision trained on KonIQ and SPAQ to rate in words; softmax over the first tokens of five level words",
        "384 x 384 whatever the aspect, and crops of it at larger size, padded with black, by Pillow's bicubic resize; "
        "exact, differentiable",
        "not read",
        "quality: Excellent 1, Good 0.75, Fair 0.5, Poor 0.25, Bad 0",
        "0 to 1",
        (),
        (
            "ignores the prompt: as the only reward it drives images away from the prompt",
            "trained on photographs",
            "the number on the model card (0.0455 for its photograph) is untested here",
        ),
    ),
    "quality_levels": Card(
        "Quality by level words, the formula of Q-Align (Wu et al., 2023, arXiv 2312.17090)",
        _CHAT,
        _CHAT_LICENCE,
        "softmax over the next token's logits of excellent, good, fair, poor, bad, times 5, 4, 3, 2, 1",
        _CHAT_IMAGES,
        "not read",
        "points",
        "1 to 5",
        (),
        (
            "ignores the prompt: as the only reward it drives images away from the prompt",
            "not Q-Align: its network was trained to answer with these words, a chat model was not",
            f"agreement with people is {UNKNOWN}",
        ),
    ),
}
