"""Memory of LoRA training on one pair, computed for SD1.5, SDXL, SD3.5 medium and FLUX.1: the smallest card for each.

    python benchmarks/small_cards.py            # writes benchmarks/results/small_cards.json

A training step (forward and backward pass of the policy with gradient checkpointing in bf16, rank 16, AdamW) is traced
on tensors without data, and the peak of the bytes that live at once is counted. A base in int8 or nf4 has the same
activations; its peak is smaller by what its weights save. `encoding` is the weights together with the text encoders and
the autoencoder, which are in memory while the data is encoded. Both without the device's context (CONTEXT).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from random_models import SIZES
from results_file import RESULTS, write_rows
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from diffalign.networks.loading import ATTENTION_LINEARS
from diffalign.networks.lora import add_lora
from diffalign.networks.placement import HALF_NORMS
from diffalign.networks.quantization import BLOCK

GIB = 2**30
CONTEXT = 0.8
"""GiB of a card outside torch's allocator."""
AUTOENCODER = 1.25
"""GiB of the autoencoder with activations, at most: the measured peaks of SD1.5 and SDXL less their other weights."""
CARDS = (6, 8, 12, 16, 24, 32, 48, 80)
BF16 = torch.bfloat16
CLIP_L, CLIP_G, T5 = 0.123e9, 0.695e9, 4.762e9
"""Parameters of the text encoders."""


class Model(NamedTuple):
    """make      the network
    channels  of the latents
    width     of the token embeddings, and their number
    pooled    width of the pooled text embedding
    encoders  parameters of all text encoders
    """

    make: Callable[[], Any]
    channels: int
    width: int
    tokens: int
    pooled: int
    encoders: float


MODELS = {
    "SD1.5": Model(partial(UNet2DConditionModel, **SIZES["sd15"].unet), 4, 768, 77, 0, CLIP_L),
    "SDXL": Model(partial(UNet2DConditionModel, **SIZES["sdxl"].unet), 4, 2048, 77, 1280, CLIP_L + CLIP_G),
    "SD3.5 medium": Model(
        partial(
            SD3Transformer2DModel,
            sample_size=128,
            num_layers=24,
            num_attention_heads=24,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            qk_norm="rms_norm",
            dual_attention_layers=tuple(range(13)),
        ),
        *(16, 4096, 77 + 256, 2048, CLIP_L + CLIP_G + T5),
    ),
    "FLUX.1": Model(partial(FluxTransformer2DModel, guidance_embeds=True), 64, 4096, 256, 768, CLIP_L + T5),
}


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, FakeTensor):
                self.add(x)
        return out

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.end, key)

    def end(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def replaced(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` that replaces parameters: torch cannot convert fake ones in place."""
    for layer in self.modules() if recurse else [self]:
        for name, p in layer._parameters.items():
            if p is not None:
                layer._parameters[name] = nn.Parameter(function(p.detach()), p.requires_grad)
    return self


def inputs(name: str, model: Model, images: int, resolution: int) -> dict[str, Any]:
    """Arguments of the network's forward pass for images of a width in pixels."""
    side = resolution // 8
    tokens = torch.zeros(images, model.tokens, model.width, dtype=BF16)
    pooled = torch.zeros(images, model.pooled, dtype=BF16)
    x = torch.zeros(images, model.channels, side, side, dtype=BF16)
    given: dict[str, Any] = {"timestep": torch.zeros(images), "encoder_hidden_states": tokens}
    if name == "FLUX.1":
        given |= {"hidden_states": torch.zeros(images, side * side // 4, model.channels, dtype=BF16)}
        given |= {"img_ids": torch.zeros(side * side // 4, 3), "txt_ids": torch.zeros(model.tokens, 3)}
        return given | {"pooled_projections": pooled, "guidance": torch.zeros(images)}
    if name == "SD3.5 medium":
        return given | {"hidden_states": x, "pooled_projections": pooled}
    added = {"text_embeds": pooled, "time_ids": torch.zeros(images, 6)}
    return given | {"sample": x} | ({"added_cond_kwargs": added} if name == "SDXL" else {})


def saved(network: nn.Module) -> dict[str, float]:
    """GiB that each kind of base saves, compared with bf16."""
    stacks = [m for m in network.modules() if isinstance(m, nn.ModuleList)]
    linear = {
        p: p.shape[0] for stack in stacks for m in stack.modules() if isinstance(m, nn.Linear) for p in [m.weight]
    }
    count, outputs = sum(p.numel() for p in linear), sum(linear.values())
    stored = {"bf16": 2 * count, "int8": count + 4 * outputs, "nf4": count * (1 / 2 + 4 / BLOCK)}
    return {kind: (2 * count - size) / GIB for kind, size in stored.items()}


def step(name: str, images: int, resolution: int, checkpointing: bool) -> tuple[float, float, dict[str, float]]:
    """GiB of the weights and of the peak of a step with a base in bf16, and what other bases save."""
    model, live = MODELS[name], Live()
    with FakeTensorMode(allow_non_fake_inputs=True), patch.object(nn.Module, "_apply", replaced), live:
        torch.set_default_dtype(BF16)
        network = model.make().train()
        torch.set_default_dtype(torch.float32)
        less = saved(network)
        for layer in network.modules():
            layer.__class__ = HALF_NORMS.get(type(layer), type(layer))
        add_lora(network, rank=16, alpha=None, targets=ATTENTION_LINEARS, seed=0)
        if checkpointing:
            network.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
        weights = sum(p.nbytes for p in network.parameters())
        trained = [p for p in network.parameters() if p.requires_grad]
        kept = [torch.empty_like(p) for p in trained for _ in range(3)]  # gradients and two moments
        given = inputs(name, model, images, resolution)
        live.peak = live.now
        with torch.autocast("cpu", dtype=BF16, cache_enabled=False):
            loss = network(**given, return_dict=False)[0].float().square().mean()
        torch.autograd.grad(loss, trained)
    assert kept
    return weights / GIB, live.peak / GIB, less


def smallest(gib: float) -> int:
    return next(card for card in CARDS if gib < card)


def rows(
    name: str, images: int, resolution: int, checkpointing: bool, kinds: Sequence[str]
) -> Iterator[dict[str, Any]]:
    weights, peak, less = step(name, images, resolution, checkpointing)
    for kind in kinds:
        encoding = weights - less[kind] + MODELS[name].encoders * 2 / GIB + AUTOENCODER
        found = {"model": name, "resolution": resolution, "base": kind, "pairs": images // 2}
        found |= {"checkpointing": checkpointing, "weights": round(weights - less[kind], 2)}
        found |= {"step": round(peak - less[kind], 2), "encoding": round(encoding, 2)}
        found |= {"card": smallest(max(peak - less[kind], encoding) + CONTEXT)}
        yield found | {"card_without_encoding": smallest(peak - less[kind] + CONTEXT)}


def main() -> None:
    measured = [("SD1.5", 2, 512, False), ("SD1.5", 16, 512, False), ("SDXL", 4, 1024, True)]
    found: list[dict[str, Any]] = []
    for name in MODELS:
        for resolution in (512, 1024):
            found += rows(name, 2, resolution, True, ("bf16", "int8", "nf4"))
            write_rows(RESULTS / "small_cards.json", found)
    for settings in measured:
        found += rows(*settings, ("bf16",))
    write_rows(RESULTS / "small_cards.json", found)


if __name__ == "__main__":
    main()
