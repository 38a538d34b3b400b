"""BLIP scorers, with a text encoder that cross-attends to the image: ImageReward, VP-Score and trained ones.

ImageReward: Xu et al., "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation" (2023).
VP-Score: Wu et al., "Multimodal Large Language Models Make Text-to-Image Generative Models Align Better" (2024), the
same network trained on ratings of four aspects.

    reward_k = head_k(BERT(ids; ViT(image))[CLS])     score = sum_k w_k (reward_k - mean_k) / std_k / sum_k w_k

Difference from the released code of ImageReward, in training only: no stochastic depth in the image tower. VP-Score has
no published code or weights, so its details could not be checked. One head per aspect, and the combination of the heads
into one score, are choices of this implementation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reward_models.base import NetworkScorer
from reward_models.blip.keys import UNUSED, body_of, to_published, to_transformers
from reward_models.blip.networks import (
    IMAGE_REWARD,
    SOURCE,
    TOKENIZER,
    build_towers,
    find_tokenizer,
    find_weights,
    new_head,
    read_architecture,
    to_grid,
    tokenizer_beside,
)
from reward_models.clip.scorers import read_rule
from reward_models.placement import as_input, full_precision, upload
from reward_models.preprocess import ImageRule
from reward_models.protocol import check_images
from reward_models.weights import CONFIG, WEIGHTS, load_strict, read_config, read_state, save_state, write_config

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the rewards on ImageReward's test set, from the authors' code."""
ASPECTS = ("prompt_following", "aesthetic", "fidelity", "harmlessness")
"""Aspects of VisionPrefer."""

IMAGE_REWARD_TRAINS = (
    r"vision\.encoder\.layers\.16\.(?!layer_norm1\.weight).*",
    r"vision\.encoder\.layers\.(1[7-9]|2[0-3])\..*",
    r"vision\.post_layernorm\..*",
    r"text\.encoder\.layer\.8\.(?!attention\.self\.query\.weight).*",
    r"text\.encoder\.layer\.(9|1[01])\..*",
    r"mlp\..*",
)
"""Weights that ImageReward's released script trains (`fix_rate` 0.7): 140,488,929. The script also freezes the first
tensor of the first trained block."""


class BLIPScorer(NetworkScorer):
    """BLIP's image tower, a BERT that attends to it in every layer, and an affine head for each aspect.

    Without `weights` or `body`, weights are random; all require gradients. `load_scorer(folder)` reads what `save`
    wrote. Only the token ids of a prompt are independent of the image, so nothing is cached.

    architecture  a mapping with the keys of IMAGE_REWARD, or the path of a .json file with one
    rule          preprocessing of images; default: Pillow's resize of the shorter side and a centre crop

    Args:
        weights: file in ImageReward's layout, or a folder or hub id with it; default: random weights
        body: as weights, without heads, which stay random; BLIP's and transformers' layouts are also read
        tokenizer: folder or hub id of a BERT tokenizer; [DEC] and [ENC] are added if missing
        aspects: names of the aspects, one head each; default: one head, as ImageReward
        aspect_weights: weights of the aspects in the score; default: equal
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        architecture: str | Mapping[str, Any] = IMAGE_REWARD,
        rule: ImageRule | None = None,
        *,
        weights: str | None = None,
        body: str | None = None,
        tokenizer: str = TOKENIZER,
        aspects: Sequence[str] = (),
        aspect_weights: Sequence[float] | None = None,
    ):
        super().__init__()
        self.architecture = read_architecture(architecture)
        self.aspects = tuple(aspects)
        self.aspect_weights = _checked_weights(self.aspects, aspect_weights)
        vision, text = self.architecture["vision"], self.architecture["text"]
        self.tokenizer = find_tokenizer(tokenizer, text["vocab_size"])
        files = [None if x is None else find_weights(x) for x in (weights, body)]
        self.rule = rule or ImageRule(vision["image_size"])
        self.vision, self.text = build_towers(vision, text)
        heads = {name: new_head(text["hidden_size"]) for name in self.aspects}
        self.mlp: nn.Module = nn.ModuleDict(heads) if heads else new_head(text["hidden_size"])
        self.register_buffer("mean", torch.zeros(len(self.aspect_weights)), persistent=False)
        self.register_buffer("std", torch.ones(len(self.aspect_weights)), persistent=False)
        self.unit = "reward"
        if files[0] is not None:
            load_strict(_Published(self), read_state(files[0]), where=files[0], ignore=UNUSED)
        if files[1] is not None:
            self._load_body(files[1])

    def set_statistics(self, mean: float | Sequence[float] | Tensor, std: float | Sequence[float] | Tensor) -> None:
        """Set the mean and standard deviation of the rewards, one number or [A], that standardise scores.

        Raises ValueError unless they are finite and std > 0.
        """
        given = [torch.as_tensor(x, dtype=torch.float32).to(self.mean.device) for x in (mean, std)]
        good = all(x.shape in ((), self.mean.shape) and x.isfinite().all() for x in given)
        if not (good and (given[1] > 0).all()):
            raise ValueError(
                f"mean and std must be one or {len(self.mean)} finite numbers, std above 0; got {mean} and {std}"
            )
        self.mean, self.std = (x.expand(self.mean.shape).clone() for x in given)
        self.unit = "standardised"

    @property
    def choice_temperature(self) -> float | None:
        """1 / s for one aspect with standard deviation s, whose reward is a choice logit (ImageReward's loss).
        None for several aspects, because their sum is not the logit of a choice."""
        used = [std for std, weight in zip(self.std.tolist(), self.aspect_weights, strict=True) if weight]
        return 1 / used[0] if len(used) == 1 else None

    def forward(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Preprocessed images and B prompts -> rewards float32, [B], or [B, A] with A aspects; not standardised."""
        image = self.vision(as_input(self.vision, pixels)).last_hidden_state
        ids, mask = (upload(x, image.device) for x in self.tokenize(prompts))
        # is_decoder=False disables the causal mask: the text is encoded, not generated
        out = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=image, is_decoder=False)
        with full_precision(image.device):
            features = out.last_hidden_state[:, 0].float()
            if isinstance(self.mlp, nn.ModuleDict):
                return torch.stack([head(features) for head in self.mlp.values()], -1)
            return self.mlp(features)

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Preprocessed images and B prompts -> float32 [B]: the weighted mean of the standardised rewards."""
        rewards = self._standardised(pixels, prompts)
        weights = torch.tensor(self.aspect_weights)
        return (rewards * upload(weights / weights.sum(), rewards.device)).sum(-1)

    def score_aspects(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """[B, 3, H, W] float in [0, 1] and B prompts -> the standardised reward float32 [B] of each aspect, or of
        `overall` for a scorer without aspects. Raises ValueError for other images."""
        check_images(images, prompts)
        rewards = self._standardised(self.preprocess(images), prompts)
        return dict(zip(self.aspects or ("overall",), rewards.unbind(-1), strict=True))

    def _standardised(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return (self(pixels, prompts).reshape(len(pixels), -1) - self.mean.float()) / self.std.float()

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B prompts -> token ids and mask, int64 [B, context_length]; longer prompts are truncated."""
        length = self.architecture["context_length"]
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length)
        return torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"])

    def token_counts(self, prompts: Sequence[str]) -> tuple[int, list[int]]:
        """Token limit of prompts, and the number of tokens of each prompt."""
        ids = self.tokenizer(list(prompts), verbose=False)["input_ids"] if prompts else []
        return self.architecture["context_length"], [len(x) for x in ids]

    def cast(self, dtype: torch.dtype) -> BLIPScorer:
        """Convert the towers to another dtype. The heads stay float32."""
        self.vision.to(dtype)
        self.text.to(dtype)
        return self

    def compile(self, *args: Any, **settings: Any) -> None:
        """Compile the image tower, the slowest part."""
        self.vision.compile(*args, **settings)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write a scorer folder for `load_scorer(folder)`.

        Weights have ImageReward's names, except heads of aspects: `mlp.<aspect>.layers.*`.
        """
        save_state(_Published(self).state_dict(), Path(folder) / WEIGHTS, {"family": "blip"})
        self.tokenizer.save_pretrained(folder)
        weights = list(self.aspect_weights) if self.aspects else None
        config = {"family": "blip", "unit": self.unit, "aspects": list(self.aspects), "aspect_weights": weights}
        config |= {"mean": self.mean.tolist(), "std": self.std.tolist()}
        write_config(folder, config | {"rule": asdict(self.rule), "architecture": self.architecture})

    @classmethod
    def from_folder(cls, folder: str | PathLike[str], config: Mapping[str, Any]) -> BLIPScorer:
        """Load a folder of `save`; config is the content of reward_config.json."""
        scorer = cls(
            config["architecture"],
            read_rule(config["rule"]),
            weights=str(Path(folder) / WEIGHTS),
            tokenizer=str(folder),
            aspects=config["aspects"],
            aspect_weights=config["aspect_weights"],
        )
        scorer.set_statistics(config["mean"], config["std"])
        scorer.unit = config["unit"]
        return scorer

    def _load_body(self, path: Path) -> None:
        """Load the two towers; position embeddings of another grid are interpolated, as in BLIP."""
        ours, name = _Published(self), "blip.visual_encoder.pos_embed"
        state, wanted = body_of(read_state(path)), ours.state_dict()
        if name in state and state[name].ndim == 3:
            state[name] = to_grid(state[name], wanted[name].shape[1])
        heads = {key: value for key, value in wanted.items() if key.startswith("mlp.")}
        load_strict(ours, state | heads, where=path)


class _Published(nn.Module):
    """A scorer with published tensor names, so that errors show the names of the file."""

    def __init__(self, scorer: BLIPScorer):
        super().__init__()
        self.scorer = [scorer]  # in a list, so that it does not become a submodule

    def state_dict(self, *args: Any, **settings: Any) -> Any:
        return to_published(self.scorer[0].state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **settings: Any) -> Any:
        return self.scorer[0].load_state_dict(to_transformers(state_dict), *args, **settings)


def image_reward(*, weights: str = SOURCE, tokenizer: str | None = None, architecture: str | None = None) -> BLIPScorer:
    """ImageReward (Xu et al., 2023), standardised as by its authors: 98 % of their images score -2 to 2.

    weights       file, folder or hub id
    tokenizer     folder or hub id; default: the tokenizer in the folder of the weights, else bert-base-uncased
    architecture  path of a .json file with the keys of IMAGE_REWARD; default: the published architecture
    """
    return _published(weights, tokenizer, architecture, MEAN, STD)


def vp_score(
    *,
    weights: str,
    tokenizer: str | None = None,
    architecture: str | None = None,
    mean: float | None = None,
    std: float | None = None,
) -> BLIPScorer:
    """VP-Score (Wu et al., 2024): ImageReward's network with your own weights, since none are published.

    weights       scorer folder written by training, with its aspects, tokenizer, architecture and statistics; or a file
                  with one head in ImageReward's layout, or a folder or hub id with it
    tokenizer     see `image_reward`; not for a scorer folder
    architecture  see `image_reward`; not for a scorer folder
    mean, std     statistics that standardise rewards; not for a scorer folder. Default: raw rewards
    """
    given = {"tokenizer": tokenizer, "architecture": architecture, "mean": mean, "std": std}
    if (Path(weights) / CONFIG).is_file():
        extra = [key for key, value in given.items() if value is not None]
        if extra:
            raise ValueError(
                f"vp_score: '{weights}' is a scorer folder: its {CONFIG} already sets {extra[0]}; leave it out"
            )
        return BLIPScorer.from_folder(weights, read_config(weights)).eval().requires_grad_(False)
    if (mean is None) != (std is None):
        raise ValueError(f"vp_score needs both mean and std of the rewards, or neither; got {mean} and {std}")
    return _published(weights, tokenizer, architecture, mean, std)


def _published(
    weights: str, tokenizer: str | None, architecture: str | None, mean: float | None, std: float | None
) -> BLIPScorer:
    """A scorer with one head, frozen."""
    if tokenizer is None:
        tokenizer = tokenizer_beside(weights)
    scorer = BLIPScorer(architecture or IMAGE_REWARD, weights=weights, tokenizer=tokenizer)
    if mean is not None and std is not None:
        scorer.set_statistics(mean, std)
    return scorer.eval().requires_grad_(False)


def _checked_weights(aspects: tuple[str, ...], weights: Sequence[float] | None) -> tuple[float, ...]:
    """One weight per head, equal by default. Raises ValueError."""
    if len(set(aspects)) != len(aspects) or not all(x.isidentifier() and x != "layers" for x in aspects):
        raise ValueError(f"aspects must be distinct names of letters, digits and _; got {', '.join(aspects)}")
    count = max(len(aspects), 1)
    values = tuple(float(x) for x in weights) if weights is not None else (1.0,) * count
    if len(values) != count or min(values) < 0 or sum(values) <= 0:
        raise ValueError(f"aspect_weights must be {count} numbers of 0 or more, not all 0; got {list(values)}")
    return values
