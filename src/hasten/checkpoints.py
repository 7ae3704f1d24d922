"""ComfyUI-style single files -> the parts of a FluxPipeline.

Shapes tell the configuration, so nothing is fetched for it. Any width and any number of blocks will do; what
the files must be is judged in weights.py. It knows no pipeline.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hasten.weights import check_kind, read_header, read_weights

ROPE_AXES = {128: (16, 56, 56)}  # by head dim; FLUX.1's. No tensor of the file tells them.

# FLUX's own names on the left, diffusers' on the right; blocks and the final layer follow in code.
OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
SINGLE = {
    "modulation.lin": "norm.linear",
    "linear2": "proj_out",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}


def load_transformer(path: Path, dtype: Any) -> Any:
    """A FluxTransformer2DModel from FLUX's own key layout.

    diffusers' from_single_file takes 3072 channels for granted and fetches its configuration; shapes tell.
    """
    from diffusers import FluxTransformer2DModel

    header = read_header(path)
    check_kind(header, "transformer")
    shapes = header.part("transformer")
    head_dim = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    if head_dim not in ROPE_AXES:
        raise ValueError(
            f"{path} has heads of {head_dim} channels: single files are read for FLUX.1's 128; "
            "give a diffusers folder instead."
        )
    width, channels = shapes["img_in.weight"]
    config: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0],
        "num_layers": _count(shapes, "double_blocks"),
        "num_single_layers": _count(shapes, "single_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": ROPE_AXES[head_dim],
    }
    state = to_diffusers(read_weights(path, "transformer", dtype))
    return _filled(lambda: FluxTransformer2DModel(**config), state, path)


def to_diffusers(state: Mapping[str, Any]) -> dict[str, Any]:
    """FLUX's own key layout as diffusers names it; joined projections are split.

    The final layer's modulation is stored shift first by FLUX, scale first by diffusers.
    """
    import torch

    out: dict[str, Any] = {}
    for key, tensor in state.items():
        room, _, rest = key.partition(".")
        if room in ("double_blocks", "single_blocks"):
            index, _, part = rest.partition(".")
            stem = f"{'transformer_blocks' if room == 'double_blocks' else 'single_transformer_blocks'}.{index}."
            names = DOUBLE if room == "double_blocks" else SINGLE
            out.update(_block_part(stem, part, tensor, names))
        elif key.startswith("final_layer.adaLN_modulation.1."):
            shift, scale = tensor.chunk(2, dim=0)
            out["norm_out.linear." + key.rpartition(".")[2]] = torch.cat([scale, shift], dim=0)
        else:
            module, _, last = key.rpartition(".")
            out[f"{OUTER.get(module, module)}.{last}"] = tensor
    return out


def _block_part(stem: str, part: str, tensor: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """One tensor of a block under diffusers' names: qkv in three, a single block's linear1 in four."""
    module, _, last = part.rpartition(".")
    if part in names:
        return {stem + names[part]: tensor}
    if module in names:
        return {f"{stem}{names[module]}.{last}": tensor}
    if module == "linear1":
        width = tensor.shape[0] // 7  # q, k, v and an mlp four times as wide
        pieces = tensor.split([width, width, width, tensor.shape[0] - 3 * width])
        owners = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
    else:
        pieces = tensor.chunk(3)
        owners = ["attn.to_q", "attn.to_k", "attn.to_v"]
        if module.startswith("txt"):
            owners = ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]
    return {f"{stem}{owner}.{last}": piece.contiguous() for owner, piece in zip(owners, pieces, strict=True)}


def load_vae(path: Path, dtype: Any) -> Any:
    """An AutoencoderKL from FLUX's ae.safetensors (LDM key layout)."""
    from diffusers import AutoencoderKL

    header = read_header(path)
    check_kind(header, "vae")
    shapes = header.part("vae")
    levels = _count(shapes, "encoder.down")
    config = {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": _count(shapes, "encoder.down.0.block"),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "force_upcast": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        vae = AutoencoderKL.from_single_file(read_weights(path, "vae", dtype), config=folder)
    return vae.to(dtype).eval()


def load_clip(path: Path, dtype: Any, tokenizer: Any) -> Any:
    """A CLIPTextModel from clip_l.safetensors; heads are 64 wide as in every CLIP text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    header = read_header(path)
    check_kind(header, "clip_l")
    shapes = header.part("clip_l")
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shapes["encoder.layers.0.mlp.fc1.weight"][0],
        projection_dim=width,
        num_hidden_layers=_count(shapes, "encoder.layers"),
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=shapes["embeddings.position_embedding.weight"][0],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _filled(lambda: CLIPTextModel(config), read_weights(path, "clip_l", dtype), path)


def load_t5(path: Path, dtype: Any) -> Any:
    """A T5EncoderModel (v1.1, gated GELU) from t5xxl*.safetensors."""
    import torch
    from transformers import T5Config, T5EncoderModel

    header = read_header(path)
    check_kind(header, "t5xxl")
    shapes = header.part("t5xxl")
    vocabulary, width = shapes["shared.weight"]
    buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads,
        d_ff=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        num_layers=_count(shapes, "encoder.block"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    state = read_weights(path, "t5xxl", dtype)
    if dtype == torch.float16:
        # T5-xxl overflows float16 in these; transformers' own loader keeps them in float32 too.
        state.update({name: value.float() for name, value in state.items() if name.endswith(".wo.weight")})
    return _filled(lambda: T5EncoderModel(config), state, path)


def _filled(build: Callable[[], Any], state: Mapping[str, Any], path: Path) -> Any:
    """The model that `build` makes, holding the file's own tensors: never twice in memory.

    Raises ValueError when a weight is missing or has another shape.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = build()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # transformers 4 keeps CLIP's weights one room deeper than transformers 5.
    room = "text_model." if any(name.startswith("text_model.") for name in shapes) else ""
    state = {room + name: tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if name in shapes}
    for name, tensor in state.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {shapes[name]}; is it FLUX.1?")
    lacking = model.load_state_dict(state, strict=False, assign=True).missing_keys
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # T5's input embedding is its shared one
    lacking = [name for name in lacking if shapes and model.get_parameter(name).is_meta]
    if lacking:
        raise ValueError(
            f"{path} lacks {len(lacking)} weights, {lacking[0]} among them: it is not a whole FLUX.1 file."
        )
    return model.eval().requires_grad_(False)


def _count(shapes: Mapping[str, Any], room: str) -> int:
    """How many numbered children `room` has: `double_blocks.0 ... 18` are 19."""
    rest = (name.removeprefix(room + ".") for name in shapes if name.startswith(room + "."))
    return 1 + max((int(part) for part in (name.partition(".")[0] for name in rest) if part.isdigit()), default=-1)
