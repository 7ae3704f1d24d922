"""Checks that ComfyUI's own Flux and autoencoder classes take flux-nano's weights and give diffusers' results.

    python comfy_check.py --comfy PATH_OF_A_COMFYUI_CHECKOUT --model ../models/flux-nano

The two key maps below are all that a loader needs: `flux_keys` and `autoencoder_keys` turn a diffusers state dict
into the layout that ComfyUI (and the original FLUX) expect.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-3

PLAIN = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}


def flux_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers FluxTransformer2DModel state dict in the names and layout of the original FLUX.

    Query, key, value (and a single block's MLP) become one matrix; the last modulation's halves swap, because
    diffusers keeps (scale, shift) and FLUX (shift, scale).
    """
    out: dict[str, Tensor] = {}
    count = lambda stem: 1 + max(int(key.split(".")[1]) for key in state if key.startswith(stem + "."))  # noqa: E731
    for end in ("weight", "bias"):
        for old, new in PLAIN.items():
            if f"{old}.{end}" in state:
                out[f"{new}.{end}"] = state[f"{old}.{end}"]
        scale, shift = state[f"norm_out.linear.{end}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat([shift, scale])
        for index in range(count("transformer_blocks")):
            old, new = f"transformer_blocks.{index}", f"double_blocks.{index}"
            join = lambda names, at=old, e=end: torch.cat([state[f"{at}.{name}.{e}"] for name in names])  # noqa: E731
            out[f"{new}.img_attn.qkv.{end}"] = join(("attn.to_q", "attn.to_k", "attn.to_v"))
            out[f"{new}.txt_attn.qkv.{end}"] = join(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"))
            out.update({f"{new}.{b}.{end}": state[f"{old}.{a}.{end}"] for a, b in DOUBLE.items()})
        for index in range(count("single_transformer_blocks")):
            old, new = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
            names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            out[f"{new}.linear1.{end}"] = torch.cat([state[f"{old}.{name}.{end}"] for name in names])
            out.update({f"{new}.{b}.{end}": state[f"{old}.{a}.{end}"] for a, b in SINGLE.items()})
    for stem, target, norms in (
        ("transformer_blocks", "double_blocks", DOUBLE_NORMS),
        ("single_transformer_blocks", "single_blocks", SINGLE_NORMS),
    ):
        for index in range(count(stem)):
            out.update({f"{target}.{index}.{b}.scale": state[f"{stem}.{index}.{a}.weight"] for a, b in norms.items()})
    return out


def autoencoder_keys(state: dict[str, Tensor], levels: int = 4) -> dict[str, Tensor]:
    """A diffusers AutoencoderKL state dict in the names and layout of the original autoencoder.

    The decoder's levels count the other way round; the mid attention's matrices become 1x1 convolutions.
    """
    out = {}
    channels = state["decoder.conv_in.weight"].shape[1]
    for key, value in state.items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", name)
        name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
        if "mid_block.attentions.0." in name:
            name = name.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
            name = name.replace("to_out.0", "proj_out").replace("to_q", "q").replace("to_k", "k").replace("to_v", "v")
            value = value[..., None, None] if value.ndim == 2 else value
        out[name] = value
    # ComfyUI's VAE builds 1x1 quant convolutions whenever it is given a ddconfig: identities stand for their absence.
    for name, width in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        out[f"{name}.weight"] = torch.eye(width, dtype=value.dtype)[..., None, None]
        out[f"{name}.bias"] = torch.zeros(width, dtype=value.dtype)
    return out


def flux_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's Flux arguments for a diffusers transformer config."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return {
        "in_channels": config["in_channels"] // 4, "out_channels": config["in_channels"] // 4, "patch_size": 2,
        "vec_in_dim": config["pooled_projection_dim"], "context_in_dim": config["joint_attention_dim"],
        "hidden_size": width, "num_heads": config["num_attention_heads"], "mlp_ratio": 4.0,
        "depth": config["num_layers"], "depth_single_blocks": config["num_single_layers"],
        "axes_dim": list(config["axes_dims_rope"]), "theta": 10000, "qkv_bias": True,
        "guidance_embed": config["guidance_embeds"],
    }  # fmt: skip


def autoencoder_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's ddconfig for a diffusers autoencoder config."""
    widths = config["block_out_channels"]
    return {
        "double_z": True, "z_channels": config["latent_channels"], "resolution": 256, "in_channels": 3, "out_ch": 3,
        "ch": widths[0], "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"], "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip


def _comfy(folder: Path) -> None:
    """Makes a ComfyUI checkout importable on a machine without a GPU."""
    # A CUDA-built torchvision refuses to import beside a CPU torch unless these two operators have a schema.
    global _operators  # kept alive, or the schemas vanish
    _operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.path.insert(0, str(folder))
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()


@torch.no_grad()
def check_flux(model: Path) -> float:
    """Largest relative difference between ComfyUI's Flux and diffusers' transformer on one batch."""
    import dataclasses

    import comfy.ldm.flux.model as comfy_flux
    import comfy.ops
    from diffusers import FluxTransformer2DModel

    ours = FluxTransformer2DModel.from_pretrained(model / "transformer", torch_dtype=torch.float32).eval()
    parameters = flux_parameters(dict(ours.config))
    for field in dataclasses.fields(comfy_flux.FluxParams):  # newer versions require more
        if (
            field.name not in parameters
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            parameters[field.name] = [] if field.name.endswith("_dims") else None
    theirs = comfy_flux.Flux(
        **parameters, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
    ).eval()
    result = theirs.load_state_dict(flux_keys(ours.state_dict()), strict=True)
    print("Flux keys:", result)
    torch.manual_seed(0)
    rows, columns, length = 10, 8, 64
    latent, text, pooled = (
        torch.randn(2, 16, 2 * rows, 2 * columns),
        torch.randn(2, length, parameters["context_in_dim"]),
        torch.randn(2, parameters["vec_in_dim"]),
    )
    sigma, guidance = torch.tensor([0.9, 0.3]), torch.tensor([3.5, 2.0])
    made = theirs(latent, sigma, text, y=pooled, guidance=guidance)
    from flow import pack, unpack, velocity

    wanted = unpack(velocity(ours, pack(latent), sigma, guidance, (text, pooled), (rows, columns)), rows, columns)
    return float((made - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def check_autoencoder(model: Path) -> float:
    """Largest difference of encoding and decoding, as ComfyUI's VAE and diffusers do it, relative to the range."""
    import comfy.sd
    from diffusers import AutoencoderKL

    ours = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32).eval()
    config = {"params": {"ddconfig": autoencoder_parameters(dict(ours.config)), "embed_dim": 16}}
    theirs = comfy.sd.VAE(sd=autoencoder_keys(ours.state_dict()), config=config, dtype=torch.float32)
    theirs.latent_channels = 16
    torch.manual_seed(0)
    picture = torch.rand(1, 96, 128, 3)
    z = ours.encode(picture.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mean
    encoded = theirs.encode(picture)
    wanted = (ours.decode(z).sample.permute(0, 2, 3, 1).clamp(-1, 1) + 1) / 2
    decoded = theirs.decode(z)
    return max(float((encoded - z).abs().max() / z.abs().max()), float((decoded - wanted).abs().max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "models" / "flux-nano")
    args = parser.parse_args()
    _comfy(args.comfy)
    differences = {"flux": check_flux(args.model), "autoencoder": check_autoencoder(args.model)}
    for name, difference in differences.items():
        print(f"{name}: largest relative difference {difference:.2e}")
    if max(differences.values()) > TOLERANCE:
        sys.exit(1)


if __name__ == "__main__":
    main()
