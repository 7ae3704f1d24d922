"""sana_weights.py reads Sana checkpoints of every layout into diffusers' names, and tells the model from its tensors.

The authors' .pth and safetensors, single files of diffusers' own layout, and diffusers folders. It builds no model.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Channels to a head of the cross attention, by width: no tensor tells. Others have 32, as the linear attention has.
CROSS_HEADS = {2240: 20, 1152: 16}
HEAD = 32
# Pixels a side that the authors' position table is made for, in latents: 2K and 4K models use it, scaled.
SCALES = {64: 1.0, 128: 2.0}

OUTER = {
    "x_embedder.proj": "patch_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "attention_y_norm": "caption_norm",
    "t_block.1": "time_embed.linear",
    "final_layer.linear": "proj_out",
    "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
}
INNER = {
    "attn.q_norm": "attn1.norm_q",
    "attn.k_norm": "attn1.norm_k",
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.q_norm": "attn2.norm_q",
    "cross_attn.k_norm": "attn2.norm_k",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.inverted_conv.conv": "ff.conv_inverted",
    "mlp.depth_conv.conv": "ff.conv_depth",
    "mlp.point_conv.conv": "ff.conv_point",
}
JOINED = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
# What a checkpoint holds and drawing does not need: a table that is computed, the empty prompt, training's variance.
UNUSED = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")
AUTHORS, DIFFUSERS = "blocks.0.cross_attn.q_linear.weight", "transformer_blocks.0.attn2.to_q.weight"


def read_sana(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A transformer's weights under diffusers' names, and SanaTransformer2DModel's arguments for them.

    path: a .pth or .safetensors file, or a diffusers folder (a pipeline's or its transformer's). Raises ValueError or
    OSError with one sentence for anything that is no Sana.
    """
    try:
        if path.is_dir():
            return _read_folder(path)
        state = {_bare(name): tensor for name, tensor in read_tensors(path).items()}
        if AUTHORS in state:
            return to_diffusers(state), config_of_authors(state)
        if DIFFUSERS in state:
            return state, config_of(state)
    except KeyError as lacking:
        raise ValueError(f"{path.name} lacks {lacking.args[0]}: it is no whole Sana; download it again.") from None
    raise ValueError(f"{path.name} is {_what_it_is(state)}: a Sana transformer is expected here.")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors or a .pth file. A .pth that would run code is refused, by the code's name.

    Raises ValueError or OSError with one sentence.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: check the name.")
    if path.suffix.lower() == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path.name} cannot be read as safetensors ({error}): download it again.") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, str(error))) from None
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{path.name} cannot be read as a PyTorch file ({_first(error)}): download it again."
        ) from None
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            # The averaged weights are the better ones, but a checkpoint may hold an empty place for them.
            loaded = loaded[key] or loaded.get("state_dict", loaded[key])
            break
    tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}
    if not tensors:
        raise ValueError(f"{path.name} holds no weights: a Sana checkpoint is expected.")
    return tensors


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' layout under diffusers' names; joined projections are split. Raises ValueError for a stray name."""
    sprint = any(name.startswith("cfg_embedder.") for name in state)
    time = "time_embed.timestep_embedder" if sprint else "time_embed.emb.timestep_embedder"
    outer = {**OUTER, "t_embedder.mlp.0": f"{time}.linear_1", "t_embedder.mlp.2": f"{time}.linear_2"}
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, last = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        if name in UNUSED:
            continue
        if name == "final_layer.scale_shift_table":
            out["scale_shift_table"] = tensor
        elif module in outer:
            out[f"{outer[module]}.{last}"] = tensor
        elif block is not None and block[2] in JOINED:
            parts = JOINED[block[2]]
            for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
                out[f"transformer_blocks.{block[1]}.{part}.{last}"] = piece
        elif block is not None and block[2] in INNER:
            out[f"transformer_blocks.{block[1]}.{INNER[block[2]]}.{last}"] = tensor
        elif last == "scale_shift_table" and re.fullmatch(r"blocks\.\d+", module):
            out[f"transformer_{name}"] = tensor
        else:
            raise ValueError(f"the checkpoint holds {name}, which no Sana that is known here has: update hasten.")
    return out


def config_of_authors(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """SanaTransformer2DModel's arguments for a checkpoint of the authors' layout."""
    config = config_of(to_diffusers({name: tensor.to("meta") for name, tensor in state.items()}))
    if "pos_embed" in state:
        side = round(state["pos_embed"].shape[1] ** 0.5)
        config |= {"sample_size": side, "interpolation_scale": SCALES.get(side)}
    return config


def config_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """SanaTransformer2DModel's arguments, told from the shapes of weights under diffusers' names."""
    width, channels, patch = state["patch_embed.proj.weight"].shape[:3]
    heads = CROSS_HEADS.get(width, max(1, width // HEAD))
    block = "transformer_blocks.0."
    return {
        "in_channels": channels,
        "out_channels": state["proj_out.weight"].shape[0] // patch**2,
        "num_attention_heads": width // HEAD,
        "attention_head_dim": HEAD,
        "num_layers": 1 + max(_numbers(state, "transformer_blocks")),
        "num_cross_attention_heads": heads,
        "cross_attention_head_dim": width // heads,
        "cross_attention_dim": width,
        "caption_channels": state["caption_projection.linear_1.weight"].shape[1],
        "mlp_ratio": state[f"{block}ff.conv_point.weight"].shape[1] / width,
        "attention_bias": f"{block}attn1.to_q.bias" in state,
        "patch_size": patch,
        "norm_elementwise_affine": f"{block}norm2.weight" in state,
        "guidance_embeds": "time_embed.guidance_embedder.linear_1.weight" in state,
        "qk_norm": "rms_norm_across_heads" if f"{block}attn1.norm_q.weight" in state else None,
    }


def model_words(config: Mapping[str, Any]) -> str:
    """The model as people call it: "Sana 1600M", "Sana 1.5 4800M", "Sana Sprint 600M"; its measures for another one."""
    blocks, width = config["num_layers"], config["num_attention_heads"] * config["attention_head_dim"]
    size = {(28, 1152): "600M", (20, 2240): "1600M", (60, 2240): "4800M"}.get((blocks, width))
    kind = "Sana Sprint" if config["guidance_embeds"] else "Sana 1.5" if config["qk_norm"] else "Sana"
    return f"{kind} {size or f'of {blocks} blocks of width {width}'}"


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    inner = folder / "transformer" if (folder / "transformer").is_dir() else folder
    try:
        config = json.loads((inner / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{folder} is no diffusers folder of a Sana: it has no config.json.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder}'s config.json is no configuration of a model: download it again.")
    if config.get("_class_name") != "SanaTransformer2DModel":
        raise ValueError(f"{folder} holds a {config.get('_class_name')}: a SanaTransformer2DModel is expected.")
    files = sorted(inner.glob("*.safetensors"))
    if any(".fp16." in f.name for f in files) and any(".fp16." not in f.name for f in files):
        files = [f for f in files if ".fp16." not in f.name]  # both variants lie there: the exact one
    if not files:
        raise FileNotFoundError(f"{folder} has no weights (*.safetensors): download the model again.")
    state = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    return state, config_of(state) | {name: value for name, value in config.items() if not name.startswith("_")}


def _bare(name: str) -> str:
    for prefix in ("model.diffusion_model.", "diffusion_model.", "module."):
        name = name.removeprefix(prefix)
    return name


def _numbers(state: Iterable[str], room: str) -> set[int]:
    return {int(found[1]) for found in (re.match(rf"{room}\.(\d+)\.", name) for name in state) if found} or {-1}


def _what_it_is(state: Mapping[str, Tensor]) -> str:
    names = set(state)
    if any(name.startswith(("double_blocks.", "single_transformer_blocks.")) for name in names):
        return "a FLUX transformer"
    if any(name.startswith(("decoder.", "encoder.")) for name in names):
        return "an autoencoder"
    if any(".self_attn.q_proj." in name for name in names):
        return "a language model"
    return "no model that is known here"


def _refusal(path: Path, error: str) -> str:
    found = re.search(r"(?:GLOBAL|Unsupported class) ([A-Za-z_][\w.]*)", error)
    if found is None:
        # torch's own words advise to have the code run.
        return f"{path.name} is no PyTorch file of weights alone: download it again, or take a safetensors file."
    return (
        f"{path.name} would run code when it is read ({found[1]}): it is refused; take a safetensors file, or a .pth "
        "with weights alone."
    )


def _first(error: object) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")[:200] if str(error).strip() else type(error).__name__
