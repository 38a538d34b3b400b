"""Single-file checkpoints in the key layouts in which models are published, made from a diffusers folder.

The layouts are those of CompVis' latent-diffusion (SD), Stability's generative-models (SDXL), SD3, Z-Image, FLUX.1,
FLUX.2 and Sana.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file
from torch import Tensor

State = dict[str, Tensor]
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET = {"conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2."}
UNET |= {f"time_embedding.linear_{i}.": f"time_embed.{2 * i - 2}." for i in (1, 2)}
UNET |= {f"add_embedding.linear_{i}.": f"label_emb.0.{2 * i - 2}." for i in (1, 2)}
OPEN_CLIP = {"encoder.layers.": "transformer.resblocks.", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
OPEN_CLIP |= {"self_attn": "attn", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "final_layer_norm": "ln_final"}
OPEN_CLIP |= {"embeddings.token_embedding.weight": "token_embedding.weight"}
OPEN_CLIP |= {"embeddings.position_embedding.weight": "positional_embedding"}
SD3 = {"pos_embed.proj.": "x_embedder.proj.", "pos_embed.pos_embed": "pos_embed", "proj_out.": "final_layer.linear."}
SD3 |= {f"time_text_embed.timestep_embedder.linear_{i}.": f"t_embedder.mlp.{2 * i - 2}." for i in (1, 2)}
SD3 |= {f"time_text_embed.text_embedder.linear_{i}.": f"y_embedder.mlp.{2 * i - 2}." for i in (1, 2)}
SD3 |= {"norm_out.linear.": "final_layer.adaLN_modulation.1."}
SD3_BLOCK = {"attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj"}
SD3_BLOCK |= {"norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1"}
SD3_BLOCK |= {"ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2"}
SD3_BLOCK |= {"ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2"}
FLUX = {
    f"time_text_embed.{ours}_embedder.linear_{i}.": f"{theirs}_in.{x}_layer."
    for ours, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))
    for i, x in ((1, "in"), (2, "out"))
}
FLUX |= {"context_embedder.": "txt_in.", "x_embedder.": "img_in.", "proj_out.": "final_layer.linear."}
FLUX |= {"norm_out.linear.": "final_layer.adaLN_modulation.1."}
FLUX_DOUBLE = {f"attn.norm_{x}.weight": f"img_attn.norm.{y}_norm.scale" for x, y in (("q", "query"), ("k", "key"))}
FLUX_DOUBLE |= {k.replace("norm_", "norm_added_"): v.replace("img", "txt") for k, v in FLUX_DOUBLE.items()}
FLUX_DOUBLE |= {"norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin", "ff.net.0.proj": "img_mlp.0"}
FLUX_DOUBLE |= {"ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2"}
FLUX_DOUBLE |= {"attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj"}
FLUX_DOUBLE |= {"attn.to_q": "img_attn.qkv", "attn.add_q_proj": "txt_attn.qkv"}
FLUX_SINGLE = {"attn.norm_q.weight": "norm.query_norm.scale", "attn.norm_k.weight": "norm.key_norm.scale"}
FLUX_SINGLE |= {"norm.linear": "modulation.lin", "proj_out": "linear2", "attn.to_q": "linear1"}

FLUX2 = {
    f"time_guidance_embed.timestep_embedder.linear_{i}.": f"time_in.{x}_layer." for i, x in ((1, "in"), (2, "out"))
}
FLUX2 |= {"context_embedder.": "txt_in.", "x_embedder.": "img_in.", "proj_out.": "final_layer.linear."}
FLUX2 |= {"norm_out.linear.": "final_layer.adaLN_modulation.1.", "single_transformer_blocks.": "single_blocks."}
FLUX2 |= {"modulation_img.linear": "modulation_img.lin", "modulation_txt.linear": "modulation_txt.lin"}
FLUX2 |= {"stream_modulation.linear": "stream_modulation.lin", "attn.to_qkv_mlp_proj": "linear1"}
FLUX2 |= {"transformer_blocks.": "double_blocks."}
FLUX2_DOUBLE = {"ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2", "ff_context.linear_in": "txt_mlp.0"}
FLUX2_DOUBLE |= {"ff_context.linear_out": "txt_mlp.2"} | FLUX_DOUBLE
FLUX2_SINGLE = {"attn.to_out": "linear2", **FLUX_SINGLE}
SANA = {"transformer_blocks.": "blocks.", "patch_embed.proj.": "x_embedder.proj.", "time_embed.linear.": "t_block.1."}
SANA |= {f"time_embed.emb.timestep_embedder.linear_{i}.": f"t_embedder.mlp.{2 * i - 2}." for i in (1, 2)}
SANA |= {f"caption_projection.linear_{i}.": f"y_embedder.y_proj.fc{i}." for i in (1, 2)}
SANA |= {"caption_norm.": "attention_y_norm.", "proj_out.": "final_layer.linear.", "attn2.to_out.0": "cross_attn.proj"}
SANA |= {
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "ff.conv_inverted": "mlp.inverted_conv.conv",
}
SANA |= {"ff.conv_depth": "mlp.depth_conv.conv", "ff.conv_point": "mlp.point_conv.conv"}
SANA |= {"attn1.to_q": "attn.qkv", "attn2.to_k": "cross_attn.kv_linear"}


def renamed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def part(folder: Path, name: str) -> State:
    return load_file(next((folder / name).glob("*.safetensors")))


def original(folder: Path) -> State:
    """All weights of a pipeline that its published single files contain."""
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    if kind == "ZImagePipeline":
        return {f"model.diffusion_model.{k}": v for k, v in z_image(part(folder, "transformer")).items()}
    if kind == "QwenImagePipeline":  # the names of diffusers; ComfyUI adds the prefix
        return {f"model.diffusion_model.{k}": v for k, v in part(folder, "transformer").items()}
    if whole := {"FluxPipeline": flux, "Flux2KleinPipeline": flux2, "SanaPipeline": sana}.get(kind):
        return whole(part(folder, "transformer"))
    state = {f"first_stage_model.{k}": v for k, v in vae(part(folder, "vae")).items()}
    if kind == "StableDiffusion3Pipeline":
        return state | {f"model.diffusion_model.{k}": v for k, v in sd3(part(folder, "transformer")).items()}
    layers = json.loads((folder / "unet/config.json").read_text())["layers_per_block"]
    state |= {f"model.diffusion_model.{k}": v for k, v in unet(part(folder, "unet"), layers).items()}
    first = "cond_stage_model" if kind == "StableDiffusionPipeline" else "conditioner.embedders.0"
    for k, v in part(folder, "text_encoder").items():
        state[f"{first}.transformer.text_model.{k.removeprefix('text_model.')}"] = v
    if kind == "StableDiffusionXLPipeline":
        state |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(part(folder, "text_encoder_2")).items()}
    return state


def unet(state: State, layers: int) -> State:
    found, attended = {}, any("up_blocks.0.attentions" in k for k in state)
    for name, value in state.items():
        side, _, rest = name.partition("_block")
        if side not in ("down", "mid", "up"):
            found[renamed(name, UNET)] = value
            continue
        numbers = [int(n) for n in re.findall(r"\.(\d+)\.", name.replace(".", ".."))]
        block, i = (0, numbers[0]) if side == "mid" else numbers[:2]
        kind, leaf = re.search(r"(resnets|attentions|downsamplers|upsamplers)\.\d+\.(.*)", rest).groups()
        where = block * (layers + 1) + i
        if side == "mid":
            new = f"middle_block.{2 * i if kind == 'resnets' else 1}"
        elif side == "down":
            new = f"input_blocks.{(block + 1) * (layers + 1) if kind == 'downsamplers' else where + 1}"
            new += ".1" if kind == "attentions" else ".0"
        else:
            new = f"output_blocks.{block * (layers + 1) + layers if kind == 'upsamplers' else where}"
            last = 2 if attended and block == 0 else 1
            new += f".{last}" if kind == "upsamplers" else ".1" if kind == "attentions" else ".0"
        leaf = re.sub(r"^[a-z_0-9]+", lambda m: RESNET[m[0]], leaf) if kind == "resnets" else leaf
        found[f"{new}.{leaf.replace('conv.', 'op.') if kind == 'downsamplers' else leaf}"] = value
    return found


def vae(state: State) -> State:
    blocks = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("decoder.up_blocks"))
    found = {}
    for name, value in state.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        if "attentions" in name:
            names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
            new = renamed(new.replace("mid_block.attentions.0", "mid.attn_1"), names)
            value = value[..., None, None] if value.ndim == 2 else value
        found[new] = value
    return found


def open_clip(state: State) -> State:
    found = {renamed(k.removeprefix("text_model."), OPEN_CLIP): v for k, v in state.items()}
    found["text_projection"] = found.pop("text_projection.weight").T.contiguous()
    for name in [k for k in found if ".q_proj." in k]:
        new = name.replace(".q_proj.", ".in_proj_")
        found[new] = torch.cat([found.pop(name.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"])
    return found


def swapped(value: Tensor) -> Tensor:
    """Scale and shift in the other order."""
    return torch.cat(value.chunk(2)[::-1])


def sd3(state: State) -> State:
    found, last = {}, max(int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks"))
    for name, value in state.items():
        block = re.match(r"transformer_blocks\.(\d+)\.(.*)\.(weight|bias)", name)
        if name.startswith("norm_out") or (block and int(block[1]) == last and block[2] == "norm1_context.linear"):
            value = swapped(value)
        if not block:
            found[renamed(name, SD3)] = value
        elif block[2] in SD3_BLOCK:
            found[f"joint_blocks.{block[1]}.{SD3_BLOCK[block[2]]}.{block[3]}"] = value
        elif block[2] in ("attn.to_q", "attn.add_q_proj"):
            side = "x_block" if block[2] == "attn.to_q" else "context_block"
            three = [state[name.replace("_q", f"_{x}")] for x in "qkv"]
            found[f"joint_blocks.{block[1]}.{side}.attn.qkv.{block[3]}"] = torch.cat(three)
    return found


def z_image(state: State) -> State:
    names = {"all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.", "to_out.0": "out"}
    names |= {"norm_q": "q_norm", "norm_k": "k_norm"}
    found = {renamed(k, names): v for k, v in state.items() if ".attention.to_k." not in k and ".to_v." not in k}
    for name in [k for k in found if ".attention.to_q." in k]:
        three = [state[name.replace("to_q", f"to_{x}")] for x in "qkv"]
        found[name.replace("to_q", "qkv")] = torch.cat(three)
        del found[name]
    return found


def flux(state: State) -> State:
    found = {}
    for name, value in state.items():
        kind, _, rest = name.partition("transformer_blocks.")
        number, _, leaf = rest.partition(".")
        if re.search("to_[kv]|add_[kv]_proj|proj_mlp", name):  # beside to_q
            continue
        if "to_q" in name or "add_q_proj" in name:
            parts = [state[name.replace("_q", f"_{x}")] for x in "qkv"]
            value = torch.cat([*parts, *([state[name.replace("attn.to_q", "proj_mlp")]] if kind else [])])
        if not rest:
            found[renamed(name, FLUX)] = swapped(value) if "norm_out" in name else value
        elif kind:
            found[f"single_blocks.{number}.{renamed(leaf, FLUX_SINGLE)}"] = value
        else:
            found[f"double_blocks.{number}.{renamed(leaf, FLUX_DOUBLE)}"] = value
    return found


def flux2(state: State) -> State:
    found = {}
    for name, value in state.items():
        if re.search("to_[kv]|add_[kv]_proj", name):  # beside to_q
            continue
        if "to_q." in name or "add_q_proj" in name:
            value = torch.cat([state[name.replace("_q", f"_{x}")] for x in "qkv"])
        kind = FLUX2_SINGLE if name.startswith("single") else FLUX2_DOUBLE if name.startswith("transformer") else {}
        found[renamed(renamed(name, FLUX2), kind)] = swapped(value) if "norm_out" in name else value
    return found


def sana(state: State) -> State:
    """With the two tensors that diffusers leaves out."""
    found = {"pos_embed": torch.zeros(1, 4, 16), "y_embedder.y_embedding": torch.zeros(3, 16)}
    for name, value in state.items():
        if re.search("attn1.to_[kv]|attn2.to_v", name):  # beside attn1.to_q, attn2.to_k
            continue
        if re.search("attn1.to_q|attn2.to_k", name):
            kinds = "qkv" if "attn1" in name else "kv"
            value = torch.cat([state[re.sub("to_[qk]", f"to_{x}", name)] for x in kinds])
        found["final_layer.scale_shift_table" if name == "scale_shift_table" else renamed(name, SANA)] = value
    return found


def flux_converter(width: int) -> Callable[..., State]:
    """The converter of diffusers for the original layout of FLUX.1, with another width than its 3072."""
    own = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    source = inspect.getsource(own)
    assert source.count("inner_dim = 3072") == 1
    made: dict[str, Callable[..., State]] = {}
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), vars(single_file_utils) | {}, made)
    return made[own.__name__]
