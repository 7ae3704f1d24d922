"""A random FluxPipeline of a few hundred thousand weights, for tests that need a model but no trained one.

`make_tiny_flux(folder)` writes an ordinary diffusers folder (2 double and 4 single blocks, head dim 16,
16-channel f8 autoencoder, both text encoders and their tokenizers) and returns it; the weights are the same
every time. Nothing here is downloaded, and nothing knows of hasten.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = (
    *("a", "an", "the", "on", "in", "of", "and", "left", "right", "above", "below", "small", "large"),
    *("red", "green", "blue", "yellow", "apple", "table", "ball", "letter", "circle", "square", "background"),
)


def make_tiny_flux(
    folder: str | Path, *, seed: int = 0, guidance: bool = True, double: int = 2, single: int = 4
) -> Path:
    """The folder, holding a complete FluxPipeline in float32 (about 2 MiB, made in about a second)."""
    import torch

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tiny_pipeline(guidance=guidance, double=double, single=single).save_pretrained(folder)
    return folder


def tiny_pipeline(*, guidance: bool = True, double: int = 2, single: int = 4, head_dim: int = 16) -> Any:
    """A FluxPipeline with weights drawn from torch's present random state."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    clip_tokens, t5_tokens = tiny_clip_tokenizer(), tiny_t5_tokenizer()
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=32,
        sample_size=256,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=tiny_clip(clip_tokens),
        tokenizer=clip_tokens,
        text_encoder_2=tiny_t5(t5_tokens),
        tokenizer_2=t5_tokens,
        transformer=tiny_transformer(guidance=guidance, double=double, single=single, head_dim=head_dim),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_transformer(*, guidance: bool = True, double: int = 2, single: int = 4, head_dim: int = 16) -> Any:
    """A FluxTransformer2DModel of width 32: two heads of 16; with head_dim 128 one head, as single files need."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=head_dim,
        num_attention_heads=2 if head_dim == 16 else 1,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        guidance_embeds=guidance,
        axes_dims_rope={16: (4, 6, 6), 64: (16, 24, 24), 128: (16, 56, 56)}[head_dim],
    )
    return model.eval()


def tiny_clip(tokenizer: Any) -> Any:
    """A CLIPTextModel of width 64, one head as CLIP's are, for that tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def tiny_t5(tokenizer: Any) -> Any:
    """A T5EncoderModel (v1.1: gated GELU) of width 32 for that tokenizer."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config).eval()


def tiny_clip_tokenizer() -> Any:
    """CLIP's byte-level tokenizer without merges: each letter is a token, so 75 letters fill it."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    pieces = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({piece: i for i, piece in enumerate(pieces)}, [], model_max_length=77)


def tiny_t5_tokenizer() -> Any:
    """T5's unigram tokenizer over a few whole words and single letters."""
    from transformers import T5TokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -3.0) for word in WORDS] + [(letter, -8.0) for letter in letters]
    return T5TokenizerFast(pieces, extra_ids=0, additional_special_tokens=[], model_max_length=512)


def make_tiny_files(folder: str | Path, pipe: Any) -> dict[str, Path]:
    """The pipeline's weights as ComfyUI-style single files: "transformer", "vae", "clip_l" and "t5xxl".

    The names are FLUX's own (double_blocks, single_blocks), LDM's and transformers'; a double of the map that
    hasten reads them with, written the other way round.
    """
    from safetensors.torch import save_file

    clip = {"text_model." + k.removeprefix("text_model."): v for k, v in pipe.text_encoder.state_dict().items()}
    t5 = {k: v for k, v in pipe.text_encoder_2.state_dict().items() if k != "encoder.embed_tokens.weight"}
    states = {
        "transformer": flux_layout(pipe.transformer.state_dict()),
        "vae": ldm_layout(pipe.vae.state_dict()),
        "clip_l": clip,
        "t5xxl": t5,
    }
    paths = {}
    for kind, state in states.items():
        paths[kind] = Path(folder) / f"{kind}.safetensors"
        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, paths[kind])
    return paths


def flux_layout(state: dict[str, Any]) -> dict[str, Any]:
    """A FluxTransformer2DModel's weights under FLUX's own names."""
    import torch

    def joined(stem: str, names: tuple[str, ...], last: str) -> Any:
        return torch.cat([state[f"{stem}{name}.{last}"] for name in names])

    outer = (
        ("img_in", "x_embedder"),
        ("txt_in", "context_embedder"),
        ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
        ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
        ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
        ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
        ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
        ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
        ("final_layer.linear", "proj_out"),
    )
    out = {}
    for ours, theirs in outer:
        for last in ("weight", "bias"):
            if f"{theirs}.{last}" in state:
                out[f"{ours}.{last}"] = state[f"{theirs}.{last}"]
    for last in ("weight", "bias"):
        scale, shift = state[f"norm_out.linear.{last}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{last}"] = torch.cat([shift, scale])
    i = 0
    while f"transformer_blocks.{i}.norm1.linear.weight" in state:
        stem, to = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        for stream, norm, attn, proj, mlp in (
            ("img", "norm1", ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_out.0", "ff"),
            ("txt", "norm1_context", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
             "attn.to_add_out", "ff_context"),
        ):  # fmt: skip
            for last in ("weight", "bias"):
                out[f"{to}{stream}_mod.lin.{last}"] = state[f"{stem}{norm}.linear.{last}"]
                out[f"{to}{stream}_attn.qkv.{last}"] = joined(stem, attn, last)
                out[f"{to}{stream}_attn.proj.{last}"] = state[f"{stem}{proj}.{last}"]
                out[f"{to}{stream}_mlp.0.{last}"] = state[f"{stem}{mlp}.net.0.proj.{last}"]
                out[f"{to}{stream}_mlp.2.{last}"] = state[f"{stem}{mlp}.net.2.{last}"]
        for added, stream in (("", "img"), ("added_", "txt")):
            for letter, word in (("q", "query"), ("k", "key")):
                weight = state[f"{stem}attn.norm_{added}{letter}.weight"]
                out[f"{to}{stream}_attn.norm.{word}_norm.scale"] = weight
        i += 1
    i = 0
    while f"single_transformer_blocks.{i}.norm.linear.weight" in state:
        stem, to = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        for last in ("weight", "bias"):
            out[f"{to}modulation.lin.{last}"] = state[f"{stem}norm.linear.{last}"]
            out[f"{to}linear1.{last}"] = joined(stem, ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), last)
            out[f"{to}linear2.{last}"] = state[f"{stem}proj_out.{last}"]
        out[f"{to}norm.query_norm.scale"] = state[f"{stem}attn.norm_q.weight"]
        out[f"{to}norm.key_norm.scale"] = state[f"{stem}attn.norm_k.weight"]
        i += 1
    return out


def ldm_layout(state: dict[str, Any]) -> dict[str, Any]:
    """A four-level AutoencoderKL's weights under LDM's names, as FLUX's ae.safetensors has them."""
    import re

    out = {}
    for name, tensor in state.items():
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm").replace("conv_norm_out", "norm_out")
        for theirs, ours in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            name = name.replace(f"mid_block.attentions.0.{theirs}.", f"mid.attn_1.{ours}.")
        if "attn_1" in name and name.endswith("weight") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        out[name.replace("conv_shortcut", "nin_shortcut")] = tensor
    return out
