"""Reward cards: source, inputs, unit, accuracies and known failures of each scorer."""

from __future__ import annotations

from textwrap import wrap

from reward_models.folder.card import UNKNOWN, Accuracy
from reward_models.folder.card import Card as Card
from reward_models.folder.vlm_cards import VLM_CARDS
from reward_models.loading import SCORERS
from reward_models.settings import nearest

WIDTH = 110
HPSV3 = "HPSv3 README (split and tie rule of Pick-a-Pic not stated)"
HPSV2 = "HPSv2 README"
MPS = "MPS README"
IMSCORE = "imscore 0.0.11, pairs without ties, tensors antialiased"

_CROP = (
    "Pillow's bicubic resize of the shorter side to 224, centre crop, {} rounding of its offset; exact, differentiable"
)
_CLIP_TEXT = "77 BPE tokens, the rest is cut off; text repaired (ftfy), HTML unescaped twice, lower-cased"
_HPS_IMAGES = (
    "float tensor, bicubic resize of the longer side to 224 (antialias=true, or false as torchvision before 0.17 did), "
    "overshoot kept, padded with black to a square"
)
_HPS_FAILURES = (
    "scores of different prompts, and of v2 and v2.1, cannot be compared",
    "style words in the prompt raise the score",
    "resizing without antialias moves scores; published v2.1 benchmark numbers may stem from it (30.63 against the "
    "28.71 that users get for SDXL 0.9), which is unverified",
    "the authors' numbers on a GPU lie on the grid of fp16, 0.00024 apart from 0.25 on",
)
_RELATIVE = "only differences between images of the same prompt mean something"

CARDS = {
    "clip": Card(
        "CLIPScore (Hessel et al., 2021, arXiv 2104.08718)",
        "any model of open_clip; by default laion2b_s34b_b79k of ViT-B-32 from the hub",
        "open_clip: MIT; that of the weights depends on the model",
        "any open_clip model",
        "as open_clip's preprocess_cfg of the model says, resized as Pillow does",
        "`prefix` before the prompt; then the tokenizer of the model, 77 tokens for most",
        "weight * max(cos, 0), weight 2.5; papers on image generation often print weight=100, prefix=''",
        "0 to about 1 with weight 2.5",
        (
            Accuracy("ImageReward test", 57.2, f"ViT-L/14; {IMSCORE}"),
            Accuracy("HPDv2 test", 62.6, f"ViT-L/14; {IMSCORE}"),
            Accuracy("Pick-a-Pic v2 test, 424 pairs", 60.6, f"ViT-L/14; {IMSCORE}"),
            Accuracy("HPDv3 test", 48.6, f"ViT-H/14; {HPSV3}"),
        ),
        ("measures whether the prompt is shown, hardly how well", "no gradient where the cosine is negative"),
    ),
    "hps_v2": Card(
        "HPSv2 (Wu et al., 2023, arXiv 2306.09341)",
        "hub xswu/HPSv2, HPS_v2_compressed.pt, 1.97 GB, fp16 weights",
        f"code Apache-2.0; weights {UNKNOWN}, see the hub",
        "open_clip ViT-H-14, 986 M parameters",
        _HPS_IMAGES,
        _CLIP_TEXT,
        "raw: cosine (hpsv2.score); x100: HPS benchmark; logit: exp(logit_scale) * cosine (ranking evaluation)",
        "0.2 to 0.35 (raw)",
        (
            Accuracy("HPDv2 test", 83.3, f"{HPSV2}; {MPS}; {HPSV3}"),
            Accuracy("ImageReward test", 65.7, f"{HPSV2}; {MPS}; {HPSV3}"),
            Accuracy("Pick-a-Pic test", 63.8, HPSV3),
            Accuracy("HPDv3 test", 65.3, HPSV3),
        ),
        _HPS_FAILURES,
    ),
    "hps_v2.1": Card(
        "HPSv2.1, HPSv2 trained on more and better data (2024)",
        "hub xswu/HPSv2, HPS_v2.1_compressed.pt, 1.97 GB, fp16 weights",
        f"code Apache-2.0; weights {UNKNOWN}, see the hub",
        "open_clip ViT-H-14, 986 M parameters",
        _HPS_IMAGES,
        _CLIP_TEXT,
        "raw: cosine (hpsv2.score); x100: HPS benchmark; logit: exp(logit_scale) * cosine (ranking evaluation)",
        "0.2 to 0.35 (raw); spreads models about four times as wide as v2",
        (
            Accuracy("HPDv2 test", 84.1, HPSV2),
            Accuracy("HPDv2 test", 83.4, IMSCORE),
            Accuracy("ImageReward test", 66.8, HPSV2),
            Accuracy("ImageReward test", 67.5, IMSCORE),
            Accuracy("Pick-a-Pic v2 test, 424 pairs", 69.3, IMSCORE),
        ),
        _HPS_FAILURES,
    ),
    "pickscore": Card(
        "PickScore (Kirstain et al., 2023, arXiv 2305.01569)",
        "hub yuvalkirstain/PickScore_v1, model.safetensors in transformers' layout, 3.9 GB",
        UNKNOWN,
        "CLIP ViT-H/14, 986 M parameters",
        _CROP.format("transformers'"),
        "77 BPE tokens of transformers' tokenizer, the rest is cut off; neither repaired nor unescaped; lower-cased",
        "logit: exp(logit_scale) * cosine, softmax over a prompt's images gives chances to win; raw, x100. Elsewhere "
        "also found divided by 26",
        "18 to 24 (logit)",
        (
            Accuracy("Pick-a-Pic v1 test", 70.2, "authors; tie threshold chosen on the validation set"),
            Accuracy("Pick-a-Pic test", 70.5, HPSV3),
            Accuracy("Pick-a-Pic v2 test, 424 pairs", 80.2, f"{IMSCORE}; its training set overlaps"),
            Accuracy("HPDv2 test", 79.8, f"{HPSV2}; {MPS}; {HPSV3}"),
            Accuracy("HPDv2 test", 79.2, IMSCORE),
            Accuracy("ImageReward test", 62.9, f"{HPSV2}; {MPS}"),
            Accuracy("ImageReward test", 61.6, HPSV3),
            Accuracy("ImageReward test", 66.7, IMSCORE),
            Accuracy("HPDv3 test", 65.6, HPSV3),
        ),
        (
            _RELATIVE,
            "trained on Pick-a-Pic v1: accuracies on v2 count prompts of its training data",
            "the crop cuts off the ends of long images",
        ),
    ),
    "aesthetic": Card(
        "LAION aesthetic predictor v2, sac+logos+ava1 (Schuhmann, 2022)",
        "head sac+logos+ava1-l14-linearMSE.pth of GitHub christophschuhmann/improved-aesthetic-predictor, by default "
        "its copy on the hub, trl-lib/ddpo-aesthetic-predictor; CLIP: open_clip's tag openai",
        f"head {UNKNOWN}; OpenAI's CLIP: MIT",
        "OpenAI CLIP ViT-L/14 (quick GELU), image tower, and five linear layers without non-linearity",
        _CROP.format("torchvision's"),
        "not read",
        "points",
        "1 to 10",
        (
            Accuracy("ImageReward test", 57.4, f"{HPSV2}; {MPS}; {HPSV3}"),
            Accuracy("ImageReward test", 56.7, IMSCORE),
            Accuracy("HPDv2 test", 76.8, f"{HPSV2}; {HPSV3}"),
            Accuracy("HPDv2 test", 72.6, MPS),
            Accuracy("HPDv2 test", 73.6, IMSCORE),
            Accuracy("Pick-a-Pic test", 56.8, HPSV3),
            Accuracy("Pick-a-Pic v2 test, 424 pairs", 55.2, IMSCORE),
            Accuracy("HPDv3 test", 59.9, HPSV3),
        ),
        (
            "ignores the prompt: as the only reward it drives images away from the prompt",
            "several heads of the same shape are about; LAION's v1 is a single linear layer and does not load here",
            "the authors' code runs CLIP in fp16 on a GPU; float32 differs by its rounding",
        ),
    ),
    "social_reward": Card(
        "Social Reward (Isajanyan et al., 2024, arXiv 2402.09872)",
        "bare state dict in OpenAI's layout, to be given as weights=FILE; no place on the hub is known",
        UNKNOWN,
        "OpenAI CLIP ViT-L/14 (quick GELU), upper layers tuned",
        _CROP.format("torchvision's"),
        _CLIP_TEXT,
        "raw: cosine; x100; logit",
        UNKNOWN,
        (),
        (
            "trained on what users of one platform edit further, not on quality",
            "its published accuracy counts ties as right",
        ),
    ),
    "image_reward": Card(
        "ImageReward (Xu et al., 2023, arXiv 2304.05977)",
        "hub THUDM/ImageReward (now zai-org), ImageReward.pt, bare state dict, 1.79 GB, fp32",
        f"code Apache-2.0; weights {UNKNOWN}, see the hub",
        "BLIP: ViT-L/16, BERT-base with cross-attention, linear head; 447 M parameters",
        _CROP.format("torchvision's"),
        "35 word pieces of bert-base-uncased, the rest is cut off",
        "standardised: by the authors' constants, mean 0.16717 and deviation 1.03334 of their test rewards",
        "-2 to 2 (98 % of theirs); negative is normal",
        (
            Accuracy("ImageReward test", 65.1, f"{HPSV2}; {MPS}; {HPSV3}"),
            Accuracy("ImageReward test", 65.8, IMSCORE),
            Accuracy("HPDv2 test", 74.0, f"{HPSV2}; {HPSV3}; imscore 0.0.11"),
            Accuracy("HPDv2 test", 70.6, MPS),
            Accuracy("Pick-a-Pic test", 61.1, HPSV3),
            Accuracy("Pick-a-Pic v2 test, 424 pairs", 60.9, IMSCORE),
            Accuracy("HPDv3 test", 58.6, HPSV3),
        ),
        (
            _RELATIVE,
            "the authors' ReFL resizes tensors, their scoring Pillow images: other numbers for the same image",
            "the authors' scoring crops palette, grey and transparent images before making them RGB",
        ),
    ),
    "vp_score": Card(
        "VP-Score (Wu, Huang, Wei, 2024, arXiv 2404.15100)",
        "no checkpoint is published; train one with train/vp_score.py",
        UNKNOWN,
        "as ImageReward, with one head for each aspect: prompt-following, aesthetic, fidelity, harmlessness",
        _CROP.format("torchvision's"),
        "35 word pieces of bert-base-uncased, the rest is cut off",
        "standardised: weighted mean of the aspects, each with its own mean and deviation",
        UNKNOWN,
        (),
        ("reconstructed from secondary sources; hyper-parameters and accuracies of the paper are unverified",),
    ),
    "jpeg": Card(
        "JPEG compressibility (DDPO: Black et al., 2023, arXiv 2305.13301)",
        "no weights",
        "Apache-2.0",
        "minus the size of the image as a JPEG file of `quality` 95",
        "as they are",
        "not used",
        "kB: minus kilobytes of 1000 bytes",
        "-150 to -20 at 512 x 512 pixels (unverified)",
        (),
        ("a smoke test of online RL: smooth, empty images win", "not differentiable"),
    ),
    "incompressibility": Card(
        "JPEG incompressibility (DDPO: Black et al., 2023, arXiv 2305.13301)",
        "no weights",
        "Apache-2.0",
        "the size of the image as a JPEG file of `quality` 95",
        "as they are",
        "not used",
        "kB: kilobytes of 1000 bytes",
        "20 to 150 at 512 x 512 pixels (unverified)",
        (),
        ("a smoke test of online RL: noise wins", "not differentiable"),
    ),
    "playground_hps": Card(
        "HPS-style scorer of the playground",
        "ships with the package; made by train/hps.py, see reward_models/playground/BUILD.md",
        "Apache-2.0",
        "CLIP: ViT with patches of 4 x 4, 3 layers of width 64, text tower of 2; 0.3 M parameters",
        "Pillow's bicubic resize to 32 x 32 pixels",
        "12 tokens; every word of the playground's captions is one",
        "logit: exp(logit_scale) * cosine",
        "differences within a caption of a few units",
        (Accuracy("held-out playground captions, true preference", 75.0, "benchmarks/results/scorers.json, seed 0"),),
        ("means nothing outside the playground", _RELATIVE),
    ),
    "playground_vp_score": Card(
        "VP-Score-style scorer of the playground",
        "ships with the package; made by train/vp_score.py, see reward_models/playground/BUILD.md",
        "Apache-2.0",
        "BLIP: ViT with patches of 4 x 4, 3 layers of width 64, text encoder of 2 with cross-attention; five heads",
        "Pillow's bicubic resize to 32 x 32 pixels",
        "12 tokens; every word of the playground's captions is one",
        "standardised: the head of the overall preference; score_aspects gives the other four too",
        "-2 to 2",
        (Accuracy("held-out playground captions, true preference", 75.4, "benchmarks/results/scorers.json, seed 0"),),
        ("means nothing outside the playground", "weak on composition (57 % of pairs)", _RELATIVE),
    ),
    "mps": Card(
        "MPS (Zhang et al., CVPR 2024), by default the overall preference",
        "hub RE-N-Y/mpsv1, model.safetensors: the authors' pickled checkpoint, re-hosted by the author of imscore; "
        "config and tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "MIT",
        "CLIP ViT-H/14 and four layers in which image tokens attend to those tokens of the prompt that resemble the "
        "condition",
        _CROP.format("transformers'"),
        "77 BPE tokens of the authors' tokenizer, padding included, the rest is cut off",
        "logit: exp(logit_scale) * cosine, about 100 * cosine",
        "differences within a prompt of a few units",
        (
            Accuracy("ImageReward test", 67.5, MPS),
            Accuracy("HPDv2 test, inversion rule", 83.5, MPS),
            Accuracy("MHP test, overall", 74.2, MPS),
        ),
        (
            _RELATIVE,
            "condition= sets what is judged; threshold=0.3 is that of the authors' evaluations, 0.01 of their example",
            "the authors' code normalises the mask over a batch, so its scores depend on batch mates; here they do not",
            "the numbers of the released weights are untested here",
        ),
    ),
    **VLM_CARDS,
}
"""Name -> card. Accuracies are the published values with their conditions. Others could not be verified."""


def card_text(name: str) -> str:
    """The card of a scorer as text. Raises ValueError, with the nearest name, for scorers without a card."""
    if name not in CARDS:
        raise ValueError(f"no card of '{name}'{nearest(name, CARDS)}; known: {', '.join(CARDS)}")
    card = CARDS[name]
    fields = ("source", "licence", "architecture", "images", "prompts", "unit", "typical")
    lines = [f"{name}: {card.title}", ""]
    for label in fields:
        lines += _field(label, getattr(card, label))
    lines += ["", "accuracy on pairs of images, in %; metrics and tie rules differ, so compare within a source only"]
    lines += [f"  {a.percent:5.1f}  {a.data}: {a.source}" for a in card.accuracies] or [f"  {UNKNOWN}"]
    lines += ["", "known failures"]
    for failure in card.failures:
        lines += wrap(failure, WIDTH, initial_indent="  - ", subsequent_indent="    ")
    return "\n".join([*lines, "", f"loads as --scorer {name} ({SCORERS[name]})"])


def _field(label: str, text: str) -> list[str]:
    return wrap(text, WIDTH, initial_indent=f"{label:<14}", subsequent_indent=" " * 14)
