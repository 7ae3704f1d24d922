"""comfy_flux_nano.py loads flux-nano, a diffusers folder, into ComfyUI's own classes: MODEL, CLIP and VAE.

Two key maps and three constructors. The text encoders are transformers' own behind ComfyUI's CLIP; network and
autoencoder are ComfyUI's. Everything of ComfyUI is imported when the node runs.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.data import models_folder

# Text is padded as hasten's own command does: to this many tokens, or the next multiple of it.
TEXT_TOKENS, MOST_TEXT_TOKENS = 64, 512

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
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
SINGLE = {
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
# Matrices that are one in ComfyUI, in the order in which they are joined.
JOINED: dict[str, dict[str, tuple[str, ...]]] = {
    "double_blocks": {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    },
    "single_blocks": {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")},
}


def load(folder: Path | None = None) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of the flux-nano in `folder` (a diffusers folder), or of the one that comes with hasten.

    Raises FileNotFoundError in one sentence when it is not there.
    """
    folder = folder or models_folder() / "flux-nano"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"flux-nano is not at {folder}: restore the pack's models folder (git checkout models)."
        )
    return load_model(folder), load_clip(folder), load_vae(folder)


def load_model(folder: Path) -> Any:
    """A ModelPatcher around ComfyUI's Flux with the folder's transformer in it."""
    import comfy.ldm.flux.model
    import comfy.model_management as management
    import comfy.supported_models
    from comfy.model_patcher import ModelPatcher

    settings = flux_settings(_config(folder / "transformer"))
    for f in dataclasses.fields(comfy.ldm.flux.model.FluxParams):
        # Newer versions ask for more than FLUX.1 has.
        if f.name not in settings and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            settings[f.name] = [] if f.name.endswith("_dims") else None
    config = comfy.supported_models.Flux({"image_model": "flux", **settings})
    schedule = _config(folder / "scheduler", "scheduler_config.json")
    # diffusers shifts by the picture's size, ComfyUI by one number: that of 256 x 256 pixels.
    config.sampling_settings = {**config.sampling_settings, "shift": schedule.get("base_shift", 0.5)}
    device = management.get_torch_device()
    exact = device.type == "cpu" or not management.should_use_bf16(device)
    config.set_inference_dtype(torch.float32 if exact else torch.bfloat16, None)
    offload = management.unet_offload_device()
    base = config.get_model({}, device=offload)
    put_weights(base.diffusion_model, flux_weights(_weights(folder / "transformer")))
    return ModelPatcher(base.eval(), device, offload)


def put_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads FLUX's weights into ComfyUI's network, whose norms' weights are `scale` or, in newer versions, `weight`.

    Buffers that the network has beyond FLUX.1's weights keep what it made them with. Raises ValueError in one sentence
    when a weight is missing or has no place.
    """
    own = {name for name, _ in network.named_parameters()}

    def named(name: str) -> str:
        return name if name in own or not name.endswith(".scale") else name.removesuffix("scale") + "weight"

    missing, unplaced = network.load_state_dict({named(k): v for k, v in weights.items()}, strict=False)
    astray = [*(name for name in missing if name in own), *unplaced]
    if astray:
        raise ValueError(
            f"flux-nano does not fit this ComfyUI's Flux ({astray[0]} and {len(astray) - 1} more): update the pack, "
            "or use a ComfyUI that docs/comfyui.md names."
        )


def load_vae(folder: Path) -> Any:
    """ComfyUI's VAE with the folder's autoencoder in it."""
    import comfy.sd

    config = _config(folder / "vae")
    settings = {"ddconfig": autoencoder_settings(config), "embed_dim": config["latent_channels"]}
    weights = autoencoder_weights(_weights(folder / "vae"), levels=len(config["block_out_channels"]))
    vae = comfy.sd.VAE(sd=weights, config={"params": settings}, dtype=torch.float32)
    # The route with a config leaves Stable Diffusion's 4.
    vae.latent_channels = config["latent_channels"]
    return vae


def load_clip(folder: Path) -> Any:
    """ComfyUI's CLIP with the folder's T5 and CLIP text encoders behind it."""
    import comfy.sd
    from comfy.supported_models_base import ClipTarget

    def tokenizer(embedding_directory: Any = None, tokenizer_data: Any = None, **_: Any) -> Tokens:
        return Tokens(folder)

    def encoder(dtype: Any = None, device: Any = None, model_options: Any = None, **_: Any) -> Encoders:
        return Encoders(folder).to(device)

    return comfy.sd.CLIP(ClipTarget(tokenizer=tokenizer, clip=encoder))


class Tokens:
    """Both tokenizers, in the form that ComfyUI's CLIP asks for."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.folder = folder
        self.words = AutoTokenizer.from_pretrained(folder / "tokenizer")
        self.pieces = AutoTokenizer.from_pretrained(folder / "tokenizer_2")

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> dict[str, Any]:
        """{"l": ..., "t5xxl": ...}, each a list of one list of (token, weight); weights in a prompt are plain text."""
        words = self.words(text, padding="max_length", max_length=77, truncation=True).input_ids
        count = len(self.pieces(text).input_ids)
        length = min(-(-max(count, 1) // TEXT_TOKENS) * TEXT_TOKENS, MOST_TEXT_TOKENS)
        pieces = self.pieces(text, padding="max_length", max_length=length, truncation=True).input_ids
        return {"l": [[(i, 1.0) for i in words]], "t5xxl": [[(i, 1.0) for i in pieces]]}

    def clone(self) -> Tokens:
        """Itself: nothing in it changes."""
        return self

    def untokenize(self, tokens: Sequence[Any]) -> list[tuple[Any, str]]:
        """Each token with its text."""
        return [(token, str(self.pieces.decode([token[0]]))) for token in tokens]

    def state_dict(self) -> dict[str, Any]:
        """Nothing of it is saved into checkpoints."""
        return {}


class Encoders(nn.Module):
    """Both text encoders in float32, in the form that ComfyUI's CLIP asks for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import CLIPTextModel, T5EncoderModel

        clip: Any = CLIPTextModel.from_pretrained(folder / "text_encoder")
        t5: Any = T5EncoderModel.from_pretrained(folder / "text_encoder_2")
        self.clip, self.t5 = clip.float().eval(), t5.float().eval()
        self.dtypes = {torch.float32}

    def set_clip_options(self, options: Mapping[str, Any]) -> None:
        """ComfyUI's CLIP skip: these encoders have one layer to offer."""

    def reset_clip_options(self) -> None:
        """See set_clip_options."""

    @torch.no_grad()
    def encode_token_weights(self, tokens: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """T5's last states (1, L, C) and CLIP's pooled one (1, C). No mask: FLUX attends to its padding."""
        words, pieces = (self._ids(tokens[key]) for key in ("l", "t5xxl"))
        pooled: Tensor = self.clip(words).pooler_output
        states: Tensor = self.t5(pieces).last_hidden_state
        return states.float().cpu(), pooled.float().cpu()

    def load_sd(self, state: Mapping[str, Tensor]) -> Any:
        """Loads weights by their names here."""
        return self.load_state_dict(dict(state), strict=False)

    def _ids(self, batches: Sequence[Sequence[Any]]) -> Tensor:
        device = next(self.parameters()).device
        return torch.tensor([[pair[0] for pair in row] for row in batches], device=device)


def flux_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """ComfyUI's Flux arguments for a diffusers transformer's config."""
    heads = config["num_attention_heads"]
    return {
        "in_channels": config["in_channels"] // 4, "out_channels": config["in_channels"] // 4, "patch_size": 2,
        "vec_in_dim": config["pooled_projection_dim"], "context_in_dim": config["joint_attention_dim"],
        "hidden_size": heads * config["attention_head_dim"], "num_heads": heads, "mlp_ratio": 4.0,
        "depth": config["num_layers"], "depth_single_blocks": config["num_single_layers"],
        "axes_dim": list(config["axes_dims_rope"]), "theta": 10000, "qkv_bias": True,
        "guidance_embed": config["guidance_embeds"],
    }  # fmt: skip


def flux_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers transformer's weights under FLUX's own names, which ComfyUI uses.

    Query, key, value (and a single block's MLP) become one matrix; the last modulation's halves change places:
    diffusers keeps (scale, shift), FLUX (shift, scale).
    """
    out: dict[str, Tensor] = {}
    for end in ("weight", "bias"):
        out |= {f"{new}.{end}": state[f"{old}.{end}"] for old, new in PLAIN.items() if f"{old}.{end}" in state}
        scale, shift = state[f"norm_out.linear.{end}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat([shift, scale])
    stacks: tuple[tuple[str, str, dict[str, str]], ...] = (
        ("transformer_blocks", "double_blocks", DOUBLE),
        ("single_transformer_blocks", "single_blocks", SINGLE),
    )
    for theirs, ours, plain in stacks:
        count = 1 + max((int(k.split(".")[1]) for k in state if k.startswith(f"{theirs}.")), default=-1)
        for i in range(count):
            for old, new in plain.items():
                for end in ("weight", "bias"):
                    weight = state.get(f"{theirs}.{i}.{old}.{end}")
                    if weight is not None:
                        out[f"{ours}.{i}.{new}.{'scale' if new.endswith('_norm') else end}"] = weight
            for new, parts in JOINED[ours].items():
                for end in ("weight", "bias"):
                    out[f"{ours}.{i}.{new}.{end}"] = torch.cat([state[f"{theirs}.{i}.{p}.{end}"] for p in parts])
    return out


def autoencoder_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """ComfyUI's ddconfig for a diffusers autoencoder's config."""
    widths = config["block_out_channels"]
    return {
        "double_z": True, "z_channels": config["latent_channels"], "resolution": config["sample_size"],
        "in_channels": config["in_channels"], "out_ch": config["out_channels"], "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths], "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip


def autoencoder_weights(state: Mapping[str, Tensor], *, levels: int) -> dict[str, Tensor]:
    """A diffusers autoencoder's weights under the original names, which ComfyUI uses.

    The decoder's levels count the other way round, the middle attention's matrices become 1x1 convolutions, and
    the two convolutions around the latent, which FLUX's autoencoder lacks, are there and do nothing.
    """
    out = {}
    for key, value in state.items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", name)
        name = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
        if "mid_block.attentions.0." in name:
            name = name.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
            name = re.sub(r"to_([qkv])\.", r"\1.", name.replace("to_out.0", "proj_out"))
            value = value[..., None, None] if value.ndim == 2 else value
        out[name] = value
    channels = state["decoder.conv_in.weight"].shape[1]
    for name, width in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        out.setdefault(f"{name}.weight", torch.eye(width)[..., None, None])
        out.setdefault(f"{name}.bias", torch.zeros(width))
    return out


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return config


def _weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a diffusers folder's safetensors files, in float32."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"there are no weights (*.safetensors) in {folder}: restore the pack's models folder.")
    return {name: tensor.float() for file in files for name, tensor in load_file(file).items()}
