"""The latent cache with the VAE and text encoder of a diffusers pipeline."""

import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from diffalign.data import ImageRef, LatentCache
from diffalign.data.cache import cond_of
from diffalign.data.images import cropped
from diffalign.types import Cond


def test_vae_latents_and_text_embeddings_are_cached_to_half_precision(tmp_path):
    """Cached latents are the scaled posterior mean: mode() * scaling_factor, not a sample."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=1, latent_channels=4, scaling_factor=0.7).eval()
    config = CLIPTextConfig(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    text = CLIPTextModel(config).eval()

    class Tiny:
        fingerprint = "tiny"

        def encode_pixels(self, pixels):
            return vae.encode(pixels * 2 - 1).latent_dist.mode() * vae.config.scaling_factor

        def encode_text(self, prompts):
            ids = torch.tensor([[ord(c) for c in p.ljust(8)[:8]] for p in prompts])
            out = text(ids)
            return Cond(out.last_hidden_state, out.pooler_output)

    images = [ImageRef(str(tmp_path / f"{k}.png")) for k in range(3)]
    for k, ref in enumerate(images):
        Image.new("RGB", (16, 16), (80 * k, 50, 200)).save(ref.path)
    cache = LatentCache(tmp_path / "cache", Tiny(), 16)
    seen = cache.add_images(images)
    cache.add_prompts(["a cat", "a dog"])
    with torch.no_grad():
        latent = Tiny().encode_pixels(cropped(images[1].read(), 16).pixels[None])
        cond = Tiny().encode_text(["a dog"])
    torch.testing.assert_close(cache.latents([seen[1].digest], []).read(0)["latent"], latent[0], rtol=2e-3, atol=2e-4)
    kept = cond_of(cache.texts(["a dog"]), 0)
    torch.testing.assert_close(kept.tokens, cond.tokens, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(kept.pooled, cond.pooled, rtol=2e-3, atol=2e-4)
