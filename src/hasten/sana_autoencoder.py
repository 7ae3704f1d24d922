"""sana_autoencoder.py reads DC-AE files of every layout into diffusers' names, and tells their measures from shapes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hasten.sana_weights import read_tensors

COMPRESSION, CHANNELS = 32, 32  # Sana's: f32c32
SCALE = 0.41407  # its latents' factor, as the authors' and diffusers' configurations have it


def read_autoencoder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A DC-AE's weights under diffusers' names, and AutoencoderDC's arguments for them.

    path: the authors' or diffusers' single file, or a diffusers folder (a pipeline's or its vae). Raises ValueError
    or OSError with one sentence for anything else, and for another compression than Sana's.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{path} has no weights (*.safetensors): download the decoder again.")
        state = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    else:
        state = read_tensors(path)
    state = {name.removeprefix("first_stage_model.").removeprefix("vae."): t for name, t in state.items()}
    if any(name.startswith("decoder.stages.") for name in state):
        from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers

        state = convert_autoencoder_dc_checkpoint_to_diffusers(state)
    try:
        config = config_of(state, path)
    except (KeyError, StopIteration):
        raise ValueError(f"{path.name} is no whole DC-AE (encoder and decoder): download it again.") from None
    told = path / "vae" / "config.json" if (path / "vae").is_dir() else path / "config.json"
    if path.is_dir() and told.is_file():
        config |= {k: v for k, v in json.loads(told.read_text(encoding="utf-8")).items() if not k.startswith("_")}
    return state, config


def config_of(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """AutoencoderDC's arguments, from shapes. Raises ValueError with one sentence for what is no DC-AE f32c32."""
    if not any(name.startswith("decoder.up_blocks.") and name.endswith("conv_depth.weight") for name in state):
        raise ValueError(f"{path.name} is no DC-AE: Sana's decoder (dc-ae-f32c32-sana) is expected here.")
    config: dict[str, Any] = {"scaling_factor": SCALE}
    for side, room in (("encoder", "down_blocks"), ("decoder", "up_blocks")):
        found = {int(m[1]) for name in state if (m := re.match(rf"{side}\.{room}\.(\d+)\.", name))}
        told = [_level(state, f"{side}.{room}.{level}.") for level in range(1 + max(found, default=0))]
        config |= {
            f"{side}_block_types": tuple(level["kind"] for level in told),
            f"{side}_block_out_channels": tuple(level["width"] for level in told),
            f"{side}_layers_per_block": tuple(level["layers"] for level in told),
            f"{side}_qkv_multiscales": tuple(level["scales"] for level in told),
        }
        heads = [level["head"] for level in told if level["head"]]
        config |= {"attention_head_dim": heads[0]} if heads else {}
    latent = state["decoder.conv_in.weight"].shape[1]
    compression = 2 ** (len(config["decoder_block_out_channels"]) - 1)
    if (compression, latent) != (COMPRESSION, CHANNELS):
        raise ValueError(
            f"{path.name} is a DC-AE f{compression}c{latent}: Sana's is f{COMPRESSION}c{CHANNELS} "
            "(dc-ae-f32c32-sana), another compression cannot decode its latents."
        )
    widths = config["encoder_block_out_channels"]
    down = next(t for n, t in state.items() if re.fullmatch(r"encoder\.down_blocks\.0\.\d+\.conv\.weight", n))
    up = next(t for n, t in state.items() if re.fullmatch(r"decoder\.up_blocks\.0\.\d+\.conv\.weight", n))
    config |= {
        "latent_channels": latent,
        "downsample_block_type": "conv" if down.shape[0] == widths[1] else "pixel_unshuffle",
        "upsample_block_type": (
            "interpolate" if up.shape[0] == config["decoder_block_out_channels"][0] else "pixel_shuffle"
        ),
    }
    return config


def _level(state: Mapping[str, Tensor], stem: str) -> dict[str, Any]:
    """One level's kind of block, width, count, attention scales and channels to a head."""
    names = [name.removeprefix(stem) for name in state if name.startswith(stem)]
    res = {int(name.split(".")[0]) for name in names if name.endswith(".conv1.weight")}
    vit = {int(name.split(".")[0]) for name in names if name.endswith(".attn.to_q.weight")}
    if not res | vit:
        raise KeyError(stem)
    first = min(res | vit)
    if res:
        width = state[f"{stem}{first}.conv1.weight"].shape[0]
        return {"kind": "ResBlock", "width": width, "layers": len(res), "scales": (), "head": 0}
    scaled = [n for n in names if re.fullmatch(rf"{first}\.attn\.to_qkv_multiscale\.\d+\.proj_in\.weight", n)]
    mixed = state.get(f"{stem}{first}.attn.to_qkv_multiscale.0.proj_out.weight")
    return {
        "kind": "EfficientViTBlock",
        "width": state[f"{stem}{first}.attn.to_q.weight"].shape[1],
        "layers": len(vit),
        "scales": tuple(state[stem + n].shape[-1] for n in sorted(scaled)),
        "head": 0 if mixed is None else mixed.shape[1],
    }
