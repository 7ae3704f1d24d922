"""A random FluxPipeline of a few hundred thousand weights, for tests that need a model but no trained one.

`make_tiny_flux(folder)` writes an ordinary diffusers folder (2 double and 4 single blocks, head dim 16,
16-channel f8 autoencoder, both text encoders and their tokenizers) and returns it; the weights are the same
every time. Nothing here is downloaded, and nothing knows of hasten.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = ("a an the on in of red green blue yellow apple table cube ball letter left right above below with "
         "and small large circle square triangle background photo drawing").split()  # fmt: skip


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


def tiny_pipeline(*, guidance: bool = True, double: int = 2, single: int = 4) -> Any:
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
        transformer=tiny_transformer(guidance=guidance, double=double, single=single),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_transformer(*, guidance: bool = True, double: int = 2, single: int = 4) -> Any:
    """A FluxTransformer2DModel of width 32: two heads of 16."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    return model.eval()


def tiny_clip(tokenizer: Any) -> Any:
    """A CLIPTextModel of width 32 for that tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
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
