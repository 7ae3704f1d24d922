"""The transformer of flux-nano and what surrounds it: packing, text, sigmas, and sampling in batches.

Knows the models, not the optimiser: train_flow.py trains what is built here, evaluate.py does not need it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

HEADS = 3
HEAD_DIM = 64
ROPE_AXES = (16, 24, 24)
DOUBLE_BLOCKS = 5
SINGLE_BLOCKS = 10
TEXT_WIDTH = 128
PACKED_CHANNELS = 64  # 16 latent channels, 2x2 patches
SCHEDULE = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}  # FLUX.1-dev's


def build_transformer() -> FluxTransformer2DModel:
    """An untrained transformer whose blocks start as the identity and whose output starts at zero."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=PACKED_CHANNELS,
        num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=ROPE_AXES,
    )
    modulations = [block.norm1.linear for block in model.transformer_blocks]
    modulations += [block.norm1_context.linear for block in model.transformer_blocks]
    modulations += [block.norm.linear for block in model.single_transformer_blocks]
    for layer in (*modulations, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def pack(latents: Tensor) -> Tensor:
    """(B, 16, H, W) -> (B, H/2 * W/2, 64), FLUX's order."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of pack; rows and columns count tokens."""
    b, _, c = tokens.shape
    return (
        tokens.view(b, rows, columns, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, 2 * rows, 2 * columns)
    )


def image_ids(rows: int, columns: int, device: str) -> Tensor:
    """(rows * columns, 3): 0, row, column."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)[None]
    return ids.view(-1, 3)


def shift_of(tokens: int) -> float:
    """exp(mu) of FLUX's dynamic shift at this number of image tokens."""
    low, high = SCHEDULE["base_image_seq_len"], SCHEDULE["max_image_seq_len"]
    slope = (SCHEDULE["max_shift"] - SCHEDULE["base_shift"]) / (high - low)
    return math.exp(SCHEDULE["base_shift"] + slope * (tokens - low))


def shifted(sigma: Tensor, tokens: int) -> Tensor:
    """Sigmas moved towards 1 by the dynamic shift."""
    shift = shift_of(tokens)
    return shift * sigma / (1 + (shift - 1) * sigma)


class Texts:
    """The frozen text side: captions in, T5 tokens and CLIP's pooled vector out."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype) -> None:
        self.clip_tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.t5_tokens = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")
        self.clip = (
            CLIPTextModel.from_pretrained(folder / "text_encoder").to(device, dtype).eval().requires_grad_(False)
        )
        self.t5 = (
            T5EncoderModel.from_pretrained(folder / "text_encoder_2").to(device, dtype).eval().requires_grad_(False)
        )
        self.device = device

    @torch.no_grad()
    def encode(self, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
        """(B, length, 128) tokens and (B, 128) pooled; unmasked and padded as FluxPipeline does."""
        ids = self.t5_tokens(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        # A causal encoder pooled at its end token does not see the padding: the longest caption is enough here.
        pooled_ids = self.clip_tokens(
            captions, padding="longest", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        tokens = self.t5(input_ids=ids.to(self.device)).last_hidden_state
        return tokens, self.clip(input_ids=pooled_ids.to(self.device)).pooler_output


def velocity(
    model: FluxTransformer2DModel,
    noisy: Tensor,
    sigma: Tensor,
    guidance: Tensor,
    text: tuple[Tensor, Tensor],
    grid: tuple[int, int],
) -> Tensor:
    """The model's noise - x0. noisy (B, N, 64), sigma and guidance (B,), grid = token rows and columns."""
    tokens, pooled = text
    ids = image_ids(*grid, str(noisy.device))
    text_ids = torch.zeros(tokens.shape[1], 3, device=noisy.device)
    return model(
        hidden_states=noisy, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=sigma, guidance=guidance,
        img_ids=ids, txt_ids=text_ids, return_dict=False,
    )[0]  # fmt: skip


@torch.no_grad()
def sample(
    model: FluxTransformer2DModel,
    text: tuple[Tensor, Tensor],
    grid: tuple[int, int],
    *,
    steps: int = 28,
    guidance: float = 3.5,
    empty: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Packed latents (B, N, 64) by Euler steps on FLUX's schedule. empty: text of "", for true guidance at `scale`."""
    batch, count = text[0].shape[0], grid[0] * grid[1]
    dtype, device = text[0].dtype, text[0].device
    noise = torch.randn(batch, count, PACKED_CHANNELS, generator=torch.Generator().manual_seed(seed)).to(device)
    sigmas = torch.cat([shifted(torch.linspace(1, 1 / steps, steps), count), torch.zeros(1)])
    x, strength = noise, torch.full((batch,), guidance, device=device, dtype=dtype)
    for now, after in pairwise(sigmas):
        at = now.expand(batch).to(device, dtype)
        v = velocity(model, x.to(dtype), at, strength, text, grid).float()
        if empty is not None:
            v0 = velocity(model, x.to(dtype), at, strength, empty, grid).float()
            v = v0 + scale * (v - v0)
        x = x + (after - now) * v
    return x


@torch.no_grad()
def decode(autoencoder: AutoencoderKL, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H, W, 3) uint8 pictures of packed latents."""
    latents = unpack(tokens.float(), *grid) / autoencoder.config.scaling_factor + autoencoder.config.shift_factor
    pictures = autoencoder.decode(latents.to(autoencoder.dtype)).sample.float()
    return ((pictures.permute(0, 2, 3, 1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
