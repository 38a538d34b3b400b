"""The published scorers of the CLIP family. To add one, add a row and a function with its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reward_models.clip.aesthetic import SOURCE, AestheticPredictor
from reward_models.clip.networks import clip_config
from reward_models.clip.scorers import CLIPScorer, Unit
from reward_models.clip.text import find_tokenizer, has_tokenizer, transformers_clip_tokenizer
from reward_models.preprocess import ImageRule


@dataclass(frozen=True)
class Published:
    """Settings of a published scorer that reproduce its authors' scores.

    source        hub id of its weights
    filename      file of the weights
    architecture  open_clip's name; `-quickgelu` for models fine-tuned from OpenAI's
    unit          unit of the authors' code
    rule          preprocessing of images, without the size
    own_tokenizer whether to use transformers' tokenizer, which does not clean up or unescape prompts
    """

    source: str
    filename: str
    architecture: str
    unit: Unit
    rule: Mapping[str, Any] = field(default_factory=dict)
    own_tokenizer: bool = False


_HPS = {"resize": "longest", "method": "antialias", "clamp": False}
HPS_V2 = Published("xswu/HPSv2", "HPS_v2_compressed.pt", "ViT-H-14", "raw", _HPS)
HPS_V2_1 = Published("xswu/HPSv2", "HPS_v2.1_compressed.pt", "ViT-H-14", "raw", _HPS)
PICKSCORE = Published(
    "yuvalkirstain/PickScore_v1", "model.safetensors", "ViT-H-14", "logit", {"crop": "transformers"}, own_tokenizer=True
)
SOCIAL_REWARD = Published("", "", "ViT-L-14-quickgelu", "raw")  # the authors mention a checkpoint, but give no download


def hps_v2(
    *,
    weights: str = HPS_V2.source,
    architecture: str = HPS_V2.architecture,
    unit: Unit = HPS_V2.unit,
    antialias: bool = True,
) -> CLIPScorer:
    """HPSv2 (Wu et al., "Human Preference Score v2", 2023), by default the raw cosine, as `hpsv2.score`.

    weights       file, folder or hub id
    architecture  open_clip's name, or a .json file
    unit          raw, as `hpsv2.score`; x100, as the HPS benchmark; logit
    antialias     antialiasing of the resize; false as the authors' code with torchvision before 0.17
    """
    return _build(_hps_resize(HPS_V2, antialias), weights, architecture, unit)


def hps_v2_1(
    *,
    weights: str = HPS_V2_1.source,
    architecture: str = HPS_V2_1.architecture,
    unit: Unit = HPS_V2_1.unit,
    antialias: bool = True,
) -> CLIPScorer:
    """HPSv2.1: HPSv2 trained on more data. Its scores are not comparable to those of HPSv2. Settings: see `hps_v2`."""
    return _build(_hps_resize(HPS_V2_1, antialias), weights, architecture, unit)


def pickscore(
    *,
    weights: str = PICKSCORE.source,
    architecture: str = PICKSCORE.architecture,
    unit: Unit = PICKSCORE.unit,
) -> CLIPScorer:
    """PickScore (Kirstain et al., "Pick-a-Pic", 2023): exp(logit_scale) * cosine.

    The softmax over the images of a prompt gives the probabilities that each is preferred.

    weights       file, transformers folder (with its tokenizer, if present) or hub id
    architecture  open_clip's name, or a .json file
    unit          logit, as the authors' code; raw; x100
    """
    return _build(PICKSCORE, weights, architecture, unit)


def social_reward(
    *, weights: str, architecture: str = SOCIAL_REWARD.architecture, unit: Unit = SOCIAL_REWARD.unit
) -> CLIPScorer:
    """Social Reward (Isajanyan et al., "Social Reward", 2024): the cosine of a tuned CLIP ViT-L/14 of OpenAI.

    weights       file with the state dict, with OpenAI's names; not available on the hub
    architecture  open_clip's name, or a .json file
    unit          raw, as the authors' code; x100; logit
    """
    scorer = _build(SOCIAL_REWARD, weights, architecture, unit)
    scorer.choice_temperature = None  # ranked by a margin, not by the likelihood of choices
    return scorer


def aesthetic(
    *, weights: str = SOURCE, clip: str = "openai", architecture: str = "ViT-L-14-quickgelu"
) -> AestheticPredictor:
    """LAION's aesthetic predictor "sac+logos+ava1" on OpenAI's CLIP ViT-L/14; prompts are ignored.

    weights       weights of the head: file, folder or hub id
    clip          weights of the CLIP model: open_clip's tag, file, folder or hub id
    architecture  architecture of the CLIP model: open_clip's name, or a .json file
    """
    return AestheticPredictor(architecture, weights=weights, clip=clip).eval().requires_grad_(False)


def _hps_resize(row: Published, antialias: bool) -> Published:
    rule = {**row.rule, "method": "antialias" if antialias else "plain"}
    return Published(row.source, row.filename, row.architecture, row.unit, rule)


def _build(row: Published, weights: str, architecture: str, unit: Unit) -> CLIPScorer:
    """The frozen scorer of a row."""
    config = clip_config(architecture)
    rule = ImageRule(config["vision_cfg"].get("image_size", 224), **row.rule)
    scorer = CLIPScorer(architecture, rule, weights=weights, filename=row.filename or None, unit=unit)
    if row.own_tokenizer:
        folder = Path(weights) if has_tokenizer(weights) else None
        text = config["text_cfg"]
        scorer.tokenize = find_tokenizer(folder, text) if folder else transformers_clip_tokenizer(text)
    return scorer.eval().requires_grad_(False)
