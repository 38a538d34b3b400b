"""User adapter: identity at initialisation, base model without a user, export for stock diffusers, one user a call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from diffalign.networks.export import export, save
from diffalign.networks.loading import Backbone, load_backbone
from diffalign.networks.user_adapter import FILE, adapter_state, add_user_adapter, mix_users, user_embeds
from diffalign.networks.verify import compare
from diffalign.types import Cond

FAMILIES = ["tiny_sd", "tiny_sdxl"]


def backbone_with_adapter(path: Path, rank: int = 0) -> Backbone:
    backbone = load_backbone(torch.device("cpu"), path=str(path))
    add_user_adapter(backbone.denoiser.network, 5, torch.float32, rank=rank)
    return backbone


def stir(backbone: Backbone) -> None:
    """Randomise the adapter, as a substitute for training."""
    torch.manual_seed(0)
    for parameter in backbone.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


def predict(backbone: Backbone, user: torch.Tensor | None, n: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    cond = backbone.encode_text(["a"] * n)._replace(user=user)
    return backbone.denoiser(torch.randn(n, 4, 8, 8), torch.full((n,), 500), cond)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 2])
def test_output_is_unchanged_at_initialisation_and_always_without_a_user(
    request: pytest.FixtureRequest, family: str, rank: int
) -> None:
    path = request.getfixturevalue(family)
    base = predict(load_backbone(torch.device("cpu"), path=str(path)), None)
    backbone = backbone_with_adapter(path, rank)
    torch.manual_seed(2)
    user = torch.randn(2, 1, 5)
    assert torch.equal(predict(backbone, user), base)
    stir(backbone)
    assert torch.equal(predict(backbone, None), base), "bit for bit"
    heard = predict(backbone, user)
    assert (heard - base).abs().max() > 1e-3
    # Users of a batch do not interact: each row alone gives the same output.
    for k in range(2):
        torch.manual_seed(1)
        x_t = torch.randn(2, 4, 8, 8)[k : k + 1]
        cond = backbone.encode_text(["a"])._replace(user=user[k : k + 1])
        assert torch.allclose(backbone.denoiser(x_t, torch.tensor([500]), cond), heard[k : k + 1], atol=1e-5)


def test_keys_have_no_gradient_in_the_first_step_only(tiny_sd: Path) -> None:
    """Values are 0 at first, so only they get gradients; later all adapter weights do, the base model never."""
    backbone = backbone_with_adapter(tiny_sd)
    network = backbone.denoiser.network
    user = torch.ones(2, 1, 5)

    def gradients() -> dict[str, float]:
        backbone.denoiser.zero_grad()
        predict(backbone, user).square().mean().backward()
        named = network.named_parameters()
        return {n: 0.0 if p.grad is None else p.grad.abs().max().item() for n, p in named if p.requires_grad}

    first = gradients()
    assert all((size > 0) == ("to_v_ip" in name) for name, size in first.items()), first
    stir(backbone)
    assert all(size > 0 for size in gradients().values())
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert all("_ip" in name or "encoder_hid_proj" in name for name in trained)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 2])
def test_export_gives_the_same_images_in_a_fresh_process(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, rank: int
) -> None:
    """Low rank in training, dense in the file; a process without diffalign samples the same images to 1e-4."""
    backbone = backbone_with_adapter(request.getfixturevalue(family), rank)
    stir(backbone)
    assert "load_ip_adapter" in export(backbone, tmp_path / "export")
    assert [p.name for p in (tmp_path / "export").iterdir()] == [FILE]
    found = compare(backbone, tmp_path / "export", 32)
    assert found["differs"] == [] and found["largest_difference"] < 1e-4


def test_order_and_repetition_of_a_users_vectors_have_no_effect(tiny_sd: Path) -> None:
    """Several vectors of one user are a set: attention over their tokens."""
    backbone = backbone_with_adapter(tiny_sd)
    stir(backbone)
    torch.manual_seed(3)
    user = torch.randn(1, 3, 5)
    once = predict(backbone, user, 1)
    assert torch.allclose(predict(backbone, user.flip(1), 1), once, atol=1e-5)
    assert torch.allclose(predict(backbone, user.repeat(1, 2, 1), 1), once, atol=1e-5)


def test_guidance_and_scale_in_the_stock_pipeline(tiny_sd: Path, tmp_path: Path) -> None:
    backbone = backbone_with_adapter(tiny_sd)
    stir(backbone)
    save(backbone, tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def images(**more: object) -> torch.Tensor:
        settings = {"num_inference_steps": 2, "output_type": "pt", "height": 32, "width": 32}
        return pipe("a", latents=latents, guidance_scale=3.0, **settings, **more).images

    base = images()
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=FILE, image_encoder_folder=None)
    user = torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(0))
    null, same = (
        images(ip_adapter_image_embeds=user_embeds(user, guidance=3.0, unconditional=u)) for u in ("null", "same")
    )
    assert not torch.allclose(null, same, atol=1e-4) and not torch.allclose(null, base, atol=1e-4)
    nobody = user_embeds(torch.zeros(1, 1, 5), guidance=3.0)
    assert torch.equal(images(ip_adapter_image_embeds=nobody), base), "nobody in particular is the base, bit for bit"
    pipe.set_ip_adapter_scale(0.0)
    assert torch.equal(images(ip_adapter_image_embeds=user_embeds(user, guidance=3.0)), base)


def test_one_user_per_call_and_explicit_mixtures() -> None:
    a, b = torch.zeros(1, 1, 5), torch.ones(1, 1, 5)
    with pytest.raises(ValueError, match="one user per pipeline call"):
        user_embeds(torch.cat([a, b]), guidance=7.5)
    assert torch.equal(mix_users([a, b], [3.0, 1.0]), torch.full((1, 1, 5), 0.25))
    for weights in ([1.0], [0.0, 0.0], [2.0, -1.0]):
        with pytest.raises(ValueError, match="weights of 0 or more, one per user"):
            mix_users([a, b], weights)
    assert user_embeds(b, guidance=1.0)[0] is b
    assert torch.equal(user_embeds(b, guidance=2.0)[0], torch.cat([a, b]))


def test_wrong_users_are_refused(tiny_sd: Path) -> None:
    backbone = backbone_with_adapter(tiny_sd)
    with pytest.raises(ValueError, match=r"cond.user must be \[2, T, 5\]; got \[2, 1, 4\]"):
        predict(backbone, torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="the network has no user adapter"):
        plain = load_backbone(torch.device("cpu"), path=str(tiny_sd))
        plain.denoiser(
            torch.zeros(1, 4, 8, 8), torch.tensor([1]), Cond(torch.zeros(1, 4, 16), user=torch.zeros(1, 1, 5))
        )


def test_names_are_those_of_ip_adapters_files(tiny_sd: Path) -> None:
    state = adapter_state(backbone_with_adapter(tiny_sd, rank=2).denoiser.network)
    attentions = [name for name in state if name.startswith("ip_adapter.")]
    assert {int(name.split(".")[1]) for name in attentions} == set(range(1, 2 * (len(attentions) // 2), 2))
    assert {name for name in state if name.startswith("image_proj.")} == {
        f"image_proj.{part}" for part in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
    }
