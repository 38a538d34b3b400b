"""LoRA files of diffusers, kohya and peft: merged, several at once, as a start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save, save_file
from stock import images, stock

from diffalign.networks.export import export
from diffalign.networks.loading import Backbone, load_backbone
from diffalign.networks.lora import lora_layers
from diffalign.networks.lora_files import load_loras, weighted
from diffalign.networks.placement import trained_parameters
from diffalign.networks.score_networks import score_networks
from diffalign.networks.verify import verify
from diffalign.types import Cond

CPU = torch.device("cpu")
TARGETS = ("to_q", "to_v", "proj_in")
"""proj_in is a convolution in Stable Diffusion 1.5."""


@pytest.fixture(autouse=True)
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))


def files(model: Path, folder: Path, seed: int = 0, **config: Any) -> dict[str, Path]:
    """The same LoRA of rank 2 and alpha 6 as three programs save it, with the module that it changes."""
    unet: Any = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    torch.manual_seed(seed)
    settings = {"r": 2, "lora_alpha": 6, "target_modules": list(TARGETS), "init_lora_weights": "gaussian", **config}
    adapted = get_peft_model(unet, LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder / "peft")
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(adapted).items()}
    alpha = {"unet.r": 2, "unet.lora_alpha": 6, "unet.target_modules": list(TARGETS)}
    pipeline = StableDiffusionXLPipeline if "xl" in str(model) else StableDiffusionPipeline
    pipeline.save_lora_weights(folder / "diffusers", state, unet_lora_adapter_metadata=alpha_of(alpha))
    kohya = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in state.items()})
    kohya = {k: torch.tensor(6.0) if k.endswith(".alpha") else v.contiguous() for k, v in kohya.items()}
    save_file(kohya, folder / "kohya.safetensors")
    return {"peft": folder / "peft", "diffusers": folder / "diffusers", "kohya": folder / "kohya.safetensors"}


def alpha_of(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("unet."): value for name, value in metadata.items()}


def output(backbone: Backbone) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    width, pooled = backbone.prompt_widths
    tokens = torch.randn(2, 12, width, generator=g)
    cond = Cond(tokens, None if pooled is None else torch.randn(2, pooled, generator=g), mask=torch.ones(2, 12))
    x_t, t = torch.randn(2, *backbone.latent_shape(32), generator=g), backbone.schedule.at(torch.tensor([0.7, 0.1]))
    with torch.no_grad():
        return backbone.denoiser(x_t, t, cond)


def with_loras(model: Path, *texts: str) -> Any:
    pipe = stock(model)
    load_loras(pipe, [weighted(text) for text in texts])
    return pipe


def drawn(pipe: Any) -> torch.Tensor:
    return images(pipe, "a red cat", 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl"])
def test_three_layouts_are_the_same_lora_in_every_use(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """In generate, merged before training, and as the start of a LoRA of another rank and alpha."""
    model = request.getfixturevalue(family)
    saved = files(model, tmp_path / family)
    expected, base = drawn(with_loras(model, str(saved["peft"]))), drawn(stock(model))
    assert (expected - base).abs().max() > 0.01
    for path in saved.values():
        torch.testing.assert_close(drawn(with_loras(model, str(path))), expected, atol=1e-5, rtol=0)
    network = {k: output(load_backbone(CPU, path=str(model), lora=(str(path),))) for k, path in saved.items()}
    settings: dict[str, Any] = {"lora_rank": 3, "lora_alpha": 1.0, "lora_targets": (*TARGETS, "to_k")}
    started = {k: load_backbone(CPU, path=str(model), lora_start=str(path), **settings) for k, path in saved.items()}
    for name, found in network.items():
        torch.testing.assert_close(found, network["peft"], atol=1e-5, rtol=0)
        torch.testing.assert_close(output(started[name]), network["peft"], atol=1e-5, rtol=0)
        trained = [*trained_parameters(started[name].denoiser)]
        assert len(trained) == 2 * len(lora_layers(started[name].denoiser)) and {p.dtype for p in trained} == {
            torch.float32
        }


def test_several_loras_act_at_once_with_weights(tiny_sd: Path, tmp_path: Path) -> None:
    """0.5 of one and -2 of the other: in the sum of the weight changes, in generate and merged."""
    one, two = files(tiny_sd, tmp_path / "1")["peft"], files(tiny_sd, tmp_path / "2", seed=1, target_modules=["to_k"])
    texts = (f"{one}:0.5", f"{two['kohya']}:-2")
    unet = stock(tiny_sd).unet
    for text in texts:
        for name, layer in with_loras(tiny_sd, text.rpartition(":")[0]).unet.named_modules():
            if hasattr(layer, "get_delta_weight"):
                unet.get_submodule(name).weight.data += float(text.rpartition(":")[2]) * layer.get_delta_weight(
                    "lora_0"
                )
    expected = stock(tiny_sd)
    expected.unet = unet
    torch.testing.assert_close(drawn(with_loras(tiny_sd, *texts)), drawn(expected), atol=1e-5, rtol=0)
    backbone = load_backbone(CPU, path=str(tiny_sd), lora=texts, lora_rank=2)
    torch.testing.assert_close(backbone.denoiser.network.conv_in.weight, unet.conv_in.weight)
    torch.testing.assert_close(drawn(stock(backbone.path)), drawn(expected), atol=1e-5, rtol=0)
    assert (backbone.path / "vae").is_symlink() and not (backbone.path / "unet").is_symlink()
    again = load_backbone(CPU, path=str(tiny_sd), lora=(texts[0], f"{two['kohya']}:-1"), lora_rank=2)
    assert again.path != backbone.path


def test_a_lora_of_a_text_encoder_is_merged_and_changes_the_fingerprint(tiny_sd: Path, tmp_path: Path) -> None:
    encoder: Any = stock(tiny_sd).text_encoder
    adapted = get_peft_model(encoder, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(adapted).items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", text_encoder_lora_layers=state)
    merged, base = (load_backbone(CPU, path=str(tiny_sd), lora=x) for x in ((str(tmp_path / "lora"),), ()))
    assert merged.fingerprint != base.fingerprint
    assert not torch.equal(merged.encode_text(["red"]).tokens, base.encode_text(["red"]).tokens)
    assert torch.equal(output(merged), output(base))
    with pytest.raises(ValueError, match=r"also changes text encoders, which do not train; 'backbone\.lora' merges it"):
        load_backbone(CPU, path=str(tiny_sd), lora_start=str(tmp_path / "lora"), lora_rank=2)


def test_loras_that_do_not_fit(tiny_sd: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    saved = files(tiny_sd, tmp_path / "lora")
    other = tmp_path / "other.safetensors"
    save_file({"unet.nowhere.lora_A.weight": torch.ones(1, 8), "unet.nowhere.lora_B.weight": torch.ones(8, 1)}, other)
    for use in ({"lora": (str(other),)}, {"lora_start": str(other), "lora_rank": 2}):
        with pytest.raises(ValueError, match=r"other\.safetensors' does not fit this model"):
            load_backbone(CPU, path=str(tiny_sd), **use)
    state = load_file(saved["kohya"])
    wrong = {
        "text": (b"no tensors", "is not a readable safetensors file"),
        "nan": ({k: v.fill_(torch.nan) if "lora_up" in k else v for k, v in state.items()}, "not finite"),
        "wide": (
            {k: v[:, :1].contiguous() if v.ndim == 2 and "lora_down" in k else v for k, v in state.items()},
            "size mismatch",
        ),
    }
    for name, (content, said) in wrong.items():
        bad = tmp_path / f"{name}.safetensors"
        bad.write_bytes(content if isinstance(content, bytes) else save(content))
        for use in ({"lora": (str(bad),)}, {"lora_start": str(bad), "lora_rank": 2, "lora_targets": TARGETS}):
            with pytest.raises(ValueError, match=rf"LoRA '.*{name}\.safetensors' .*{said}"):
                load_backbone(CPU, path=str(tiny_sd), **use)
    with pytest.raises(FileNotFoundError, match="LoRA 'nowhere' does not exist"):
        load_backbone(CPU, path=str(tiny_sd), lora=("nowhere:0.5",))
    start = {"path": str(tiny_sd), "lora_start": str(saved["kohya"])}
    with pytest.raises(ValueError, match=r"'backbone\.lora_start' has rank 2; set 'backbone\.lora_rank' to 2 or more"):
        load_backbone(CPU, **start, lora_rank=1, lora_targets=TARGETS)
    with pytest.raises(ValueError, match=r"changes 4 layers that are not in 'backbone\.lora_targets': .*proj_in"):
        load_backbone(CPU, **start, lora_rank=2)
    dora = files(tiny_sd, tmp_path / "dora", use_dora=True)["peft"]
    with pytest.raises(ValueError, match="is a DoRA, which cannot start a LoRA"):
        load_backbone(CPU, path=str(tiny_sd), lora_start=str(dora), lora_rank=2, lora_targets=TARGETS)


def test_a_run_on_merged_loras_is_verified_against_the_merged_model(tiny_sd: Path, tmp_path: Path) -> None:
    """Its LoRA and the merged ones together draw the run's images; a whole pipeline contains them."""
    style = f"{files(tiny_sd, tmp_path / 'style')['kohya']}:0.5"
    for settings in ({"lora_rank": 2}, {}):
        backbone = load_backbone(CPU, path=str(tiny_sd), lora=(style,), **settings)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in trained_parameters(backbone.denoiser):
                parameter += 0.1 * torch.randn(parameter.shape)
        export(backbone, tmp_path / "run/export")
        assert "verified in a fresh process" in verify(backbone, tmp_path / "run/export", 32)
        folder = tmp_path / "run/export"
        with_run = with_loras(tiny_sd, style, str(folder)) if settings else stock(folder)
        own = backbone.pipeline(backbone.denoiser.network)
        torch.testing.assert_close(drawn(with_run), drawn(own), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["tiny_sd3", "tiny_flux", "tiny_z_image", "tiny_sana", "tiny_flux2_klein"])
def test_an_export_of_every_family_is_merged_and_started_from(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Both files of the export; also a pipeline that omits T5."""
    model = str(request.getfixturevalue(family))
    run = load_backbone(CPU, path=model, lora_rank=2, lora_alpha=6.0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(run.denoiser):
            parameter += 0.1 * torch.randn(parameter.shape)
    export(run, tmp_path / "export")
    expected = output(run)
    for name in ("pytorch_lora_weights.safetensors", "comfyui.safetensors"):
        file = str(tmp_path / "export" / name)
        for use in ({"lora": (file,)}, {"lora_start": file, "lora_rank": 4}):
            torch.testing.assert_close(output(load_backbone(CPU, path=model, **use)), expected, atol=1e-5, rtol=0)


def test_two_players_share_weights_only_with_the_same_loras_beneath(tiny_sd: Path, tmp_path: Path) -> None:
    style, model = str(files(tiny_sd, tmp_path / "style")["peft"]), str(tiny_sd)
    teacher: dict[str, Any] = {"path": model, "lora_rank": 2, "lora_alpha": None, "seed": 1, "lora_targets": ("to_q",)}
    for lora, shared in (((style,), True), ((), False)):
        backbone = load_backbone(CPU, path=model, lora=(style,), lora_rank=2)
        network = backbone.denoiser.network
        scores = score_networks(backbone, CPU, model, **teacher, lora=lora)
        assert (scores.aux.network is network) == shared  # type: ignore[comparison-overlap]
