"""A random SanaPipeline of a few hundred thousand weights, for tests that need a model but no trained one.

`make_tiny_sana(folder)` writes an ordinary diffusers folder (4 blocks of width 32, a Gemma-2 of width 24 with its
tokenizer, a DC-AE of 32 channels and a 32nd of the side) and returns it; the weights are the same every time. Nothing
here is downloaded, and nothing knows of hasten.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The width of the tiny Gemma-2's states.
WORD = 24


def make_tiny_sana(folder: str | Path, *, seed: int = 0, **options: Any) -> Path:
    """The folder, holding a complete SanaPipeline in float32."""
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tiny_sana_pipeline(**options).save_pretrained(folder)
    return folder


def tiny_sana_pipeline(**options: Any) -> Any:
    """A SanaPipeline with weights drawn from torch's present random state."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

    tokenizer = tiny_gemma_tokenizer()
    pipe = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_gemma(tokenizer),
        vae=tiny_autoencoder(),
        transformer=tiny_sana_transformer(**options),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sana_transformer(
    *, blocks: int = 4, sprint: bool = False, qk_norm: bool = False, scale: float | None = None, side: int = 32
) -> Any:
    """A SanaTransformer2DModel of width 64: two heads of 32 in both attentions, 32 channels in and out.

    scale: interpolation_scale, as 2K and 4K models have it. side: sample_size.
    """
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=blocks,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=WORD,
        sample_size=side,
        interpolation_scale=scale,
        guidance_embeds=sprint,
        qk_norm="rms_norm_across_heads" if sprint or qk_norm else None,
    )
    return model.eval()


def tiny_autoencoder() -> Any:
    """An AutoencoderDC with six levels of widths that its shortcuts can divide."""
    from diffusers import AutoencoderDC

    model = AutoencoderDC(
        attention_head_dim=8,
        encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        encoder_block_out_channels=(8, 8, 16, 16, 32, 32),
        decoder_block_out_channels=(8, 8, 16, 16, 32, 32),
        encoder_layers_per_block=(1, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=0.41407,
    )
    return model.eval()


def tiny_gemma(tokenizer: Any) -> Any:
    """A Gemma2Model of two layers and width 24 for that tokenizer."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WORD,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        max_position_embeddings=1024,
        sliding_window=1024,
        query_pre_attn_scalar=12,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Gemma2Model(config).eval()


def tiny_gemma_tokenizer() -> Any:
    """Gemma's tokenizer without merges: each letter is a token, <bos> leads."""
    from transformers import GemmaTokenizerFast

    letters = ["▁", *(chr(code) for code in range(33, 127)), "\n"]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *letters]
    vocabulary: Any = {piece: i for i, piece in enumerate(pieces)}
    return GemmaTokenizerFast(vocab=vocabulary, merges=[], add_bos_token=True)


@functools.cache
def _weights(seed: int, options: tuple[tuple[str, Any], ...]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return tiny_sana_transformer(**dict(options))


def sana(*, seed: int = 0, scheduler: Any = None, **options: Any) -> Any:
    """A SanaPipeline of its own, or a SanaSprintPipeline, without encoder and decoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaSprintPipeline, SCMScheduler

    sprint = options.get("sprint", False)
    kind = SanaSprintPipeline if sprint else SanaPipeline
    default = SCMScheduler() if sprint else FlowMatchEulerDiscreteScheduler(shift=3.0)
    transformer = copy.deepcopy(_weights(seed, tuple(sorted(options.items()))))
    pipe = kind(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler or default)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape: int, seed: int) -> Tensor:
    """Normal noise of that shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(*lengths: int, seed: int = 1, tokens: int = 10, negative: bool = True) -> dict[str, Any]:
    """Embeddings and masks of prompts with so many tokens each, and of as many empty negative ones."""
    given = {
        "prompt_embeds": noise(len(lengths), tokens, WORD, seed=seed),
        "prompt_attention_mask": torch.stack([(torch.arange(tokens) < n).long() for n in lengths]),
    }
    if negative:
        empty = words(*(1 for _ in lengths), seed=seed + 100, tokens=tokens, negative=False)
        given |= {f"negative_{name}": value for name, value in empty.items()}
    return given


def paint(pipe: Any, *, steps: int = 8, seed: int = 0, side: int = 4, **given: Any) -> Tensor:
    """The latents that the pipeline ends with, (B, 32, side, side)."""
    sprint = pipe.transformer.config.guidance_embeds
    if "prompt_embeds" not in given:
        given = {**words(6, negative=not sprint), **given}
    if sprint and steps != 2:
        given.setdefault("intermediate_timesteps", None)
    given.setdefault("generator", torch.Generator().manual_seed(seed))
    given.setdefault("guidance_scale", 4.5)
    out = pipe(
        prompt=None,
        height=side * 32,
        width=side * 32,
        num_inference_steps=steps,
        output_type="latent",
        use_resolution_binning=False,
        **({} if sprint else {"negative_prompt": None}),
        **given,
    )
    return out.images  # type: ignore[no-any-return]


def authors_layout(model: Any) -> dict[str, Tensor]:
    """A SanaTransformer2DModel's weights under the authors' names, with what their checkpoints hold beside."""
    state, config = model.state_dict(), model.config
    time = "time_embed." + ("" if config.guidance_embeds else "emb.") + "timestep_embedder."
    outer = {
        "patch_embed.proj": "x_embedder.proj",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "caption_norm": "attention_y_norm",
        "time_embed.linear": "t_block.1",
        "proj_out": "final_layer.linear",
        f"{time}linear_1": "t_embedder.mlp.0",
        f"{time}linear_2": "t_embedder.mlp.2",
        "time_embed.guidance_embedder.linear_1": "cfg_embedder.mlp.0",
        "time_embed.guidance_embedder.linear_2": "cfg_embedder.mlp.2",
    }
    inner = {
        "attn1.norm_q": "attn.q_norm",
        "attn1.norm_k": "attn.k_norm",
        "attn1.to_out.0": "attn.proj",
        "attn2.to_q": "cross_attn.q_linear",
        "attn2.norm_q": "cross_attn.q_norm",
        "attn2.norm_k": "cross_attn.k_norm",
        "attn2.to_out.0": "cross_attn.proj",
        "ff.conv_inverted": "mlp.inverted_conv.conv",
        "ff.conv_depth": "mlp.depth_conv.conv",
        "ff.conv_point": "mlp.point_conv.conv",
    }
    out = {"final_layer.scale_shift_table": state["scale_shift_table"]}
    for theirs, ours in outer.items():
        out |= {f"{ours}.{e}": state[f"{theirs}.{e}"] for e in ("weight", "bias") if f"{theirs}.{e}" in state}
    for i in range(config.num_layers):
        stem, to = f"transformer_blocks.{i}.", f"blocks.{i}."
        out[f"{to}scale_shift_table"] = state[f"{stem}scale_shift_table"]
        out[f"{to}attn.qkv.weight"] = torch.cat([state[f"{stem}attn1.to_{x}.weight"] for x in "qkv"])
        for e in ("weight", "bias"):
            out[f"{to}cross_attn.kv_linear.{e}"] = torch.cat([state[f"{stem}attn2.to_{x}.{e}"] for x in "kv"])
            out |= {f"{to}{o}.{e}": state[f"{stem}{t}.{e}"] for t, o in inner.items() if f"{stem}{t}.{e}" in state}
    out["pos_embed"] = torch.zeros(1, config.sample_size**2, 4)
    out["y_embedder.y_embedding"] = torch.zeros(10, config.caption_channels)
    if config.guidance_embeds:
        out |= {"logvar_linear.weight": torch.zeros(1, 64), "logvar_linear.bias": torch.zeros(1)}
    return {name: tensor.clone().contiguous() for name, tensor in out.items()}
