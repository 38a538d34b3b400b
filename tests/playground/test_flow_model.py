"""The shipped flow-matching pipeline and its builder."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from diffalign.playground import BASE, FLOW
from diffalign.playground.build import LENGTH, encode, report_card
from diffalign.playground.build_flow import (
    T5_LENGTH,
    T5_LENGTH_DEFAULT,
    build_flow,
    embed,
    shifted_autoencoder,
    sigmas,
    train_flow,
    transformer,
)
from diffalign.playground.world import wishes


@cache
def shipped() -> StableDiffusion3Pipeline:
    return DiffusionPipeline.from_pretrained(FLOW).to(torch.float32)


def test_the_shipped_folder_is_a_stock_sd3_pipeline_under_eight_megabytes() -> None:
    pipeline = shipped()
    assert type(pipeline) is StableDiffusion3Pipeline
    assert sum(f.stat().st_size for f in FLOW.rglob("*") if f.is_file()) < 8 * 2**20
    assert not [f for f in FLOW.rglob("*") if f.suffix in (".bin", ".pt", ".ckpt")]


def test_its_t5_is_as_silent_as_one_left_out() -> None:
    """Without T5 the stock pipeline uses zeros, which equal the output of this T5, so images do not change."""
    without = DiffusionPipeline.from_pretrained(FLOW, text_encoder_3=None, tokenizer_3=None).to(torch.float32)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    images = [
        p("large red circle on white", latents=noise, num_inference_steps=2, max_sequence_length=8, output_type="pt")
        for p in (shipped(), without)
    ]
    assert torch.equal(images[0].images, images[1].images)


def test_the_quiet_length_holds_every_caption() -> None:
    """With a longer caption the stock pipeline would warn of truncation at every call."""
    everything = [w.caption for held_out in (True, False) for w in wishes(held_out=held_out)]
    words = shipped().tokenizer_3(everything).input_ids
    assert max(len(ids) for ids in words) < T5_LENGTH
    assert shipped().tokenizer_3.unk_token_id not in {i for ids in words for i in ids}


def test_its_latents_have_mean_zero_and_deviation_one_after_shift_and_scale() -> None:
    vae = shipped().vae
    assert vae.config.shift_factor != 0
    latents = (encode(vae, 256, seed=5)[0] - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(latents.mean().item()) < 0.03
    assert abs(latents.std().item() - 1) < 0.03


@pytest.mark.parametrize("zeros", [T5_LENGTH, T5_LENGTH_DEFAULT])
def test_training_sees_the_embeddings_that_the_stock_pipeline_makes(zeros: int) -> None:
    pipeline, prompts = shipped(), ["small red circle left on white", ""]
    ids = pipeline.tokenizer(prompts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        tokens, pooled = embed((pipeline.text_encoder, pipeline.text_encoder_2), ids, zeros)
        stock = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=zeros
        )
    assert tokens.shape == (2, LENGTH + zeros, pipeline.transformer.config.joint_attention_dim)
    torch.testing.assert_close(tokens, stock[0])
    torch.testing.assert_close(pooled, stock[2])


def test_training_targets_the_velocity_at_the_timestep_that_the_stock_scheduler_announces() -> None:
    """scale_noise(x0, t, eps) = (1 - sigma) x0 + sigma eps with t = 1000 sigma; so d x / d sigma = eps - x0."""
    scheduler = shipped().scheduler
    scheduler.set_timesteps(10)
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    x0, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    noisy = scheduler.scale_noise(x0, scheduler.timesteps[4:7], noise)
    torch.testing.assert_close(noisy, torch.lerp(x0, noise, scheduler.sigmas[4:7].view(-1, 1, 1, 1)))
    scheduler.set_timesteps(10)
    after = scheduler.step(noise - x0, scheduler.timesteps[0], noisy).prev_sample
    torch.testing.assert_close(after, noisy + (scheduler.sigmas[1] - scheduler.sigmas[0]) * (noise - x0))


def test_sigmas_lie_inside_and_half_of_them_around_the_middle() -> None:
    """Medians: sigmoid(0.8) = 0.690 of the first half, 0.5 of the second."""
    drawn = sigmas(20001, torch.Generator().manual_seed(0))
    assert drawn.shape == (20001,) and drawn.min() > 0 and drawn.max() < 1
    assert abs(drawn[:10000].median() - 0.690) < 0.01
    assert abs(drawn[10000:].median() - 0.5) < 0.02


def test_the_untrained_transformer_predicts_zero_and_its_last_layer_can_learn() -> None:
    net = transformer()
    width = net.config.joint_attention_dim
    out = net(
        torch.randn(2, 4, 16, 16),
        encoder_hidden_states=torch.randn(2, 5, width),
        pooled_projections=torch.randn(2, width),
        timestep=torch.tensor([10.0, 900.0]),
    ).sample
    assert out.shape == (2, 4, 16, 16) and not out.any()
    out.sum().backward()
    assert net.proj_out.weight.grad.abs().min() > 0


def test_two_steps_build_a_folder_that_reloads_to_the_same_model(tmp_path: Path) -> None:
    build_flow(tmp_path / "flow", tmp_path / "work", BASE, steps=2, images=8, samples=2)
    measured = json.loads((tmp_path / "flow_build.json").read_text())["measured"]
    assert [m["max_sequence_length"] for m in measured] == [T5_LENGTH, T5_LENGTH_DEFAULT]
    built, files = ({str(f.relative_to(d)) for f in d.rglob("*.*")} for d in (tmp_path / "flow", FLOW))
    assert built == files
    for name in ("model_index.json", "tokenizer_3/tokenizer.json", "tokenizer/vocab.json", "tokenizer/merges.txt"):
        ours, theirs = ((d / name).read_text().split() for d in (tmp_path / "flow", FLOW))
        assert ours == theirs, name
    # The checkpoint is complete, so the second call trains nothing and finds the same weights.
    again = train_flow(tmp_path / "work", BASE, steps=2, images=8)
    written = DiffusionPipeline.from_pretrained(tmp_path / "flow")
    for part in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        left, right = getattr(written, part).state_dict(), getattr(again, part).state_dict()
        assert left.keys() == right.keys()
        assert all(torch.equal(left[k], right[k].half().to(left[k].dtype)) for k in left), part
    assert type(written.text_encoder) is CLIPTextModelWithProjection
    shift, scale = written.vae.config.shift_factor, written.vae.config.scaling_factor
    fresh = shifted_autoencoder(BASE, 8)
    assert (shift, scale) == (fresh.config.shift_factor, fresh.config.scaling_factor)


@pytest.mark.learning
@pytest.mark.parametrize("zeros", [T5_LENGTH, T5_LENGTH_DEFAULT])
def test_the_shipped_model_draws_what_held_out_captions_ask_for(zeros: int) -> None:
    card = report_card(shipped(), n=64, guidance=2.0, steps=12, max_sequence_length=zeros)
    for aspect in ("colour", "background", "size"):
        assert card[aspect] >= 0.95, card
    assert card["shape"] >= 0.85, card
