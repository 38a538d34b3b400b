"""The diffusion_dpo configs of the flow families, with tiny models: a step, and the layers that train."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
FOUR = {"to_q", "to_k", "to_v", "to_out.0"}
EIGHT = FOUR | {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
CONFIGS = {
    "sd35_lora": ("tiny_sd3", EIGHT),
    "flux": ("tiny_flux", FOUR),
    "z_image": ("tiny_z_image", FOUR),
    "sana": ("tiny_sana", FOUR),
    "flux2_klein": ("tiny_flux2_klein", EIGHT | {"to_qkv_mlp_proj"}),
    "qwen_image": ("tiny_qwen_image", EIGHT),
}


@pytest.fixture(autouse=True)
def one_precision() -> Iterator[None]:
    """Accelerate keeps one precision a process, and these configs set bf16."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_step_with_the_config_trains_its_layers(
    tmp_path: Path, request: pytest.FixtureRequest, pairs_file: Path, recipe: Callable, config: str
) -> None:
    family, layers = CONFIGS[config]
    settings = [f"backbone.path={request.getfixturevalue(family)}", f"data.path={pairs_file}", "data.num_workers=0"]
    settings += [
        f"run.folder={tmp_path / 'run'}",
        "data.resolution=32",
        "data.limit=4",
        "backbone.max_sequence_length=16",
    ]
    settings += ["trainer.steps=1", "trainer.grad_accum=1", "hooks.sample_every=0", "run.log_every=1"]
    recipe("diffusion_dpo", f"--config={ROOT / 'configs' / 'diffusion_dpo' / config}.yaml", *settings)
    (row,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["policy/loss"] == pytest.approx(0.6931, abs=1e-3)  # the policy starts as the reference
    assert json.loads((tmp_path / "run" / "export" / "verify.json").read_text())["verified"]
    names = {n.split(".lora")[0] for n in load_file(tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors")}
    assert {n.split(".")[-1] if n[-2:] != ".0" else "to_out.0" for n in names} == layers


@pytest.mark.parametrize("name", ["pso", "draft", "diffusion_nft"])
def test_a_step_with_the_configs_of_z_image_turbo(
    tmp_path: Path, tiny_z_image: Path, recipe: Callable, name: str
) -> None:
    (tmp_path / "prompts.txt").write_text("red circle\nblue square\n")
    settings = [f"backbone.path={tiny_z_image}", f"data.path={tmp_path / 'prompts.txt'}", "data.resolution=32"]
    settings += [f"run.folder={tmp_path / 'run'}", "backbone.max_sequence_length=16", "trainer.steps=1"]
    settings += ["reward.scorers=[playground_vp_score]", "monitor.prompts=null", "trainer.grad_accum=1"]
    settings += ["hooks.sample_every=0", "hooks.verify_export=false", "data.batch_size=2"]
    settings += ["rollouts.group_size=2", "rollouts.chunk=2"] if name == "diffusion_nft" else []
    recipe(name, f"--config={ROOT / 'configs' / name / 'z_image_turbo.yaml'}", *settings)
    assert (tmp_path / "run/export/pytorch_lora_weights.safetensors").exists()


def test_the_second_attention_of_sd35_medium_gets_no_lora() -> None:
    import yaml

    from diffalign.networks.lora import add_lora

    network = SD3Transformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, dual_attention_layers=(0,)
    )
    for recipe in ("diffusion_dpo", "rank_dpo"):
        config = yaml.safe_load((ROOT / "configs" / recipe / "sd35_lora.yaml").read_text())
        add_lora(network, rank=2, alpha=None, targets=config["backbone"]["lora_targets"], seed=0, name=recipe)
    found = {n.split(".lora_")[0] for n, p in network.named_parameters() if p.requires_grad}
    assert any(".attn2.to_q" in n for n, _ in network.named_modules())
    # The last block drops the text tokens, so it has no to_add_out.
    assert len(found) == 2 * 8 - 1 and all(".attn." in n for n in found)
