"""The parts of sana-nano: a small DC-AE, a small Gemma-2 with its tokenizer, a small Sana, and Euler steps.

Knows the models, not the optimisers: sana_train.py trains what is built here.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from torch import Tensor
from train_text import WIDTH
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizerFast

SCALE = 0.41407  # Sana's own: ComfyUI's latent format has it as a constant, so the weights are fitted to it
SHIFT = 3.0
SIDE = 256  # pixels: 8 x 8 latents
TOKENS = 64  # of text; hasten and evaluate ask for as many
HEADS, BLOCKS = 8, 6
LEVELS = (16, 32, 64, 128, 256, 256)


def build_autoencoder() -> AutoencoderDC:
    """An untrained DC-AE f32c32 without shortcuts around the latent: its scale can be folded into two convolutions."""
    kinds = ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2
    scales = ((), (), (), (), (5,), (5,))
    return AutoencoderDC(
        latent_channels=32, attention_head_dim=32, encoder_block_types=kinds, decoder_block_types=kinds,
        encoder_block_out_channels=LEVELS, decoder_block_out_channels=LEVELS, encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1, 1, 2, 2, 1, 1), encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate", downsample_block_type="conv", encoder_out_shortcut=False,
        decoder_in_shortcut=False, scaling_factor=SCALE,
    )  # fmt: skip


@torch.no_grad()
def fold_scale(model: AutoencoderDC, pictures: Tensor) -> None:
    """Gives each latent channel a deviation of 1 / SCALE over these pictures; what the model decodes stays the same."""
    latents = torch.cat([model.encode(part).latent.float() for part in pictures.split(64)])
    factor = (1 / SCALE / latents.std((0, 2, 3)).clamp_min(1e-4)).to(model.dtype)
    model.encoder.conv_out.weight *= factor[:, None, None, None]
    model.encoder.conv_out.bias *= factor
    model.decoder.conv_in.weight /= factor[None, :, None, None]


def build_tokenizer(captions: list[str]) -> GemmaTokenizerFast:
    """Gemma's kind of tokenizer: blanks are a letter, <bos> leads; every usual word of the captions is one token."""
    words = Counter(word for caption in captions for word in caption.lower().split())
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.decoder = decoders.Replace("▁", " ")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    letters = ["▁", "\n", *(chr(code) for code in range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    # Word by word, so that no token reaches over a blank; once with it and once without, as the first word stands.
    learner.train_from_iterator((form for word in words.elements() for form in (f" {word}", word)), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return GemmaTokenizerFast(vocab=learner.get_vocab(), merges=merges, add_bos_token=True)


def build_text(tokenizer: GemmaTokenizerFast) -> Gemma2Model:
    """An untrained Gemma-2 of two layers, WIDTH wide."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=384, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32,
            max_position_embeddings=1024, sliding_window=1024, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def build_transformer() -> SanaTransformer2DModel:
    """An untrained Sana of BLOCKS blocks whose output starts at zero. It has the position table that 2K models have:
    so few blocks do not find out from the convolutions alone where a token stands.
    """
    model = SanaTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=32, num_layers=BLOCKS, num_cross_attention_heads=HEADS,
        cross_attention_head_dim=32, cross_attention_dim=32 * HEADS, caption_channels=WIDTH, sample_size=SIDE // 32,
        interpolation_scale=1.0, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def encode(model: Gemma2Model, tokenizer: GemmaTokenizerFast, captions: list[str]) -> tuple[Tensor, Tensor]:
    """States (B, TOKENS, WIDTH) and their mask, as SanaPipeline takes them from a prompt without instruction."""
    tokenizer.padding_side = "right"
    given = tokenizer(
        [caption.lower().strip() for caption in captions], padding="max_length", max_length=TOKENS, truncation=True,
        return_tensors="pt",
    ).to(model.device)  # fmt: skip
    states: Tensor = model(given.input_ids, attention_mask=given.attention_mask).last_hidden_state
    return states, given.attention_mask


def velocity(model: Any, noisy: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
    """The model's noise - x0. noisy (B, 32, H, W), sigma (B,)."""
    out: Tensor = model(
        noisy, encoder_hidden_states=text[0].to(noisy.dtype), encoder_attention_mask=text[1], timestep=1000 * sigma,
        return_dict=False,
    )[0]  # fmt: skip
    return out


@torch.no_grad()
def sample(
    model: Any, text: tuple[Tensor, Tensor], empty: tuple[Tensor, Tensor], *, steps: int = 20, guidance: float = 4.5
) -> Tensor:
    """Latents (B, 32, 8, 8) by guided Euler steps, shifted as Sana's are; row i has seed i."""
    count, device = len(text[0]), text[0].device
    x = torch.stack([torch.randn(32, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(count)])
    x, empty = x.to(device), tuple(part.expand(count, *part.shape[1:]) for part in empty)  # type: ignore[assignment]
    plain = torch.linspace(1, 0, steps + 1)
    for now, after in pairwise((SHIFT * plain / (1 + (SHIFT - 1) * plain)).tolist()):
        at = torch.full((count,), now, device=device)
        with_text, without = (velocity(model, x.to(model.dtype), at, given).float() for given in (text, empty))
        x = x + (after - now) * (without + guidance * (with_text - without))
    return x
