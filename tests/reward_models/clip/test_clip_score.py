"""CLIPScore on a tiny open_clip model with random weights in a local-dir: folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from reward_models import CLIPScore, Scorer, check_images
from reward_models.clip.networks import image_size
from reward_models.clip.scorers import TEXT_CHUNK
from reward_models.protocol import Resizing

PROMPTS = ["a red cube", "two dogs", "", "a red cube", "the sea at night &amp; day " * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
    }
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(open_clip.model.CLIP(**config).state_dict(), path / "open_clip_model.safetensors")
    return path


@pytest.fixture(scope="module")
def clip(folder: Path) -> CLIPScore:
    return CLIPScore(model=f"local-dir:{folder}")


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Noise of 8 bits, each image in another colour."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(5, 3, 48, 40, generator=generator) * torch.rand(5, 3, 1, 1, generator=generator)
    return (255 * noise).round() / 255


def _cosines(folder: Path, images: Tensor, texts: list[str]) -> Tensor:
    """Reference with open_clip's functions and Pillow."""
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    pixels = torch.stack([transform(to_pil_image((255 * x).round().byte())) for x in images])
    with torch.no_grad():
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(open_clip.tokenize(texts), normalize=True)
    return (image * text).sum(-1)


def test_equals_open_clip(clip: CLIPScore, folder: Path, images: Tensor) -> None:
    cosines = _cosines(folder, images, ["A photo depicts " + p for p in PROMPTS])
    assert cosines.min() < 0 < cosines.max()  # scores on both sides of the clamp
    scores = clip.score(images, PROMPTS)
    assert scores.shape == (5,) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, 2.5 * cosines.clamp(min=0), atol=1e-5, rtol=0)


def test_weight_and_prefix(folder: Path, images: Tensor) -> None:
    clip = CLIPScore(model=f"local-dir:{folder}", weight=100, prefix="")
    expected = 100 * _cosines(folder, images, PROMPTS).clamp(min=0)
    torch.testing.assert_close(clip.score(images, PROMPTS), expected, atol=1e-3, rtol=0)
    assert clip.unit == "100*max(cos,0)"


def test_scores_do_not_depend_on_batch_order_and_size(clip: CLIPScore, images: Tensor) -> None:
    scores, order = clip.score(images, PROMPTS), [3, 0, 4, 1, 2]
    shuffled = clip.score(images[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(shuffled, scores[order], atol=1e-5, rtol=0)
    parts = [clip.score(images[i : i + 2], PROMPTS[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), scores, atol=1e-5, rtol=0)


def test_frozen_but_differentiable_in_the_pixels(clip: CLIPScore, images: Tensor) -> None:
    """Images at the clamp have no gradient; others have a finite nonzero one that raises the score."""
    x = images.clone().requires_grad_()
    scores = clip.score(x, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    assert torch.isfinite(gradient).all()
    moved = gradient.abs().sum((1, 2, 3)) > 0
    assert torch.equal(moved, scores > 0) and moved.any()
    better = clip.score((images + 0.01 * gradient.sign()).clamp(0, 1), PROMPTS)
    assert (better[moved] > scores[moved]).all()
    assert not any(p.requires_grad for p in clip.parameters()) and not clip.training


def test_prompt_features_do_not_depend_on_the_cache(folder: Path) -> None:
    """Bit for bit: after a resume, prompts are encoded in other batches."""
    texts = [f"prompt {i}" for i in range(TEXT_CHUNK + 3)]
    one, other = (CLIPScore(model=f"local-dir:{folder}") for _ in range(2))
    other.encode_text(texts[2:5])
    assert torch.equal(one.encode_text(texts), other.encode_text(texts))
    calls = []
    one.clip.register_forward_pre_hook(lambda *_: calls.append(1))
    one.clip.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    one.encode_text(texts)
    assert not calls
    one.half()
    assert one.encode_text(texts[:1]).dtype == torch.float32 and calls  # computed again from other weights


def test_prompts_encoded_in_inference_mode_can_be_used_for_gradients(folder: Path, images: Tensor) -> None:
    clip = CLIPScore(model=f"local-dir:{folder}", weight=-100)
    with torch.inference_mode():
        clip.score(images, PROMPTS)
    x = images.clone().requires_grad_()
    assert torch.autograd.grad(clip.score(x, PROMPTS).sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("height, width", [(40, 40), (48, 77), (77, 48), (32, 32), (20, 31)])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_is_open_clips(
    height: int, width: int, resize_mode: str, interpolation: str, folder: Path, tmp_path: Path
) -> None:
    """Bit for bit before the normalisation, on noise."""
    settings = {"resize_mode": resize_mode, "interpolation": interpolation, "fill_color": 90}
    description = json.loads((folder / "open_clip_config.json").read_text())
    description["preprocess_cfg"] |= settings
    (tmp_path / "open_clip_config.json").write_text(json.dumps(description))
    (tmp_path / "open_clip_model.safetensors").symlink_to(folder / "open_clip_model.safetensors")
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    clip = CLIPScore(model=f"local-dir:{tmp_path}")
    expected = image_transform_v2(PreprocessCfg(**clip.clip.visual.preprocess_cfg), is_train=False)
    ours = clip.preprocess(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255)[0]
    torch.testing.assert_close(ours, expected(Image.fromarray(picture)), atol=1e-6, rtol=0)


def test_networks_with_non_square_input_are_refused(folder: Path, tmp_path: Path) -> None:
    description = json.loads((folder / "open_clip_config.json").read_text())
    description["model_cfg"]["vision_cfg"]["image_size"] = [32, 32]  # as many as it was trained with
    (tmp_path / "open_clip_config.json").write_text(json.dumps(description))
    (tmp_path / "open_clip_model.safetensors").symlink_to(folder / "open_clip_model.safetensors")
    assert CLIPScore(model=f"local-dir:{tmp_path}").rule.size == 32
    clip = CLIPScore(model=f"local-dir:{folder}").clip
    clip.visual.image_size = (32, 24)
    with pytest.raises(ValueError, match="takes images of 32 x 24; only square ones"):
        image_size(clip)


def test_implements_scorer_and_resizing(clip: CLIPScore, images: Tensor) -> None:
    assert isinstance(clip, Scorer) and isinstance(clip, Resizing) and clip.differentiable
    assert torch.equal(clip.score_pixels(clip.preprocess(images), PROMPTS), clip.score(images, PROMPTS))


def test_images_of_other_dtype_or_shape_are_refused(clip: CLIPScore) -> None:
    with pytest.raises(ValueError) as error:
        clip.score(torch.zeros(4, 512, 512, 3, dtype=torch.uint8), ["x"] * 4)
    assert str(error.value) == "images must be float in [0, 1] with shape [B, 3, H, W]; got uint8 (4, 512, 512, 3)"
    with pytest.raises(ValueError, match=r"got float32 \(1, 1, 8, 8\)"):
        clip.score(torch.zeros(1, 1, 8, 8), ["x"])
    with pytest.raises(ValueError, match=r"with values from -1 to 1"):
        clip.score(torch.tensor([-1.0, 1.0]).repeat(96).view(1, 3, 8, 8), ["x"])
    with pytest.raises(ValueError, match="one prompt per image; got 1 for 2 images"):
        check_images(torch.zeros(2, 3, 8, 8), ["x"])
    with pytest.raises(ValueError, match="got 'xy' for 2 images"):
        check_images(torch.zeros(2, 3, 8, 8), "xy")


def test_weights_that_cannot_be_loaded_are_one_clear_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pretrained 'no/such\.safetensors' does not exist"):
        CLIPScore(pretrained="no/such.safetensors")
    with pytest.raises(ValueError, match=r"no model 'ViTB32', did you mean 'ViT-B-32'\?"):
        CLIPScore(model="ViTB32")
    with pytest.raises(ValueError, match="cannot load model 'ViT-B-32' with pretrained 'laion9b'"):
        CLIPScore(pretrained="laion9b")
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    with pytest.raises(ValueError, match="could not be loaded"):  # does not fall back to random weights
        CLIPScore(model=f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"\x08" + bytes(7) + b"{}")
    with pytest.raises(ValueError, match="cannot load model 'local-dir:"):
        CLIPScore(model=f"local-dir:{tmp_path}")


def test_gradient_is_the_slope(folder: Path, images: Tensor) -> None:
    """Central differences along a random direction, away from the clamp; without the rounding to 8 bits, which has no
    slope."""
    clip = CLIPScore(model=f"local-dir:{folder}")
    clip.rule = replace(clip.rule, method="antialias")
    k = int(clip.score(images, PROMPTS).argmax())
    x, prompt = images[k : k + 1] * 0.8 + 0.1, [PROMPTS[k]]
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    direction /= direction.norm()
    gradient = torch.autograd.grad(clip.score(x.requires_grad_(), prompt).sum(), x)[0]
    h = 0.05
    with torch.no_grad():
        slope = (clip.score(x + h * direction, prompt) - clip.score(x - h * direction, prompt)) / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), slope[0], rtol=0.02, atol=1e-4)
