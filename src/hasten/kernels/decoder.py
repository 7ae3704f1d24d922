"""What DC-AE's decoder does between its convolutions, each piece one pass over a picture with its channels last.

Norm over the channels + residual; every pixel made four, with the update added. Floor: every tensor once in and once
out: at 1024x1024 with 128 channels in 16 bits a picture is 268 MB, 63 us at 4.27 TB/s. Without Triton, or off the GPU,
torch does the same in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.operation import operation
from hasten.kernels.rows import triton_kernels

# Numbers of one program of norm_add, at least; pixels of a row and channels of one program of spread.
NUMBERS, PIXELS, CHANNELS = 2048, 16, 128


def norm_add(pixels: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the last dimension, times weight, plus bias and residual, in pixels' dtype; float32 in between.

    pixels, residual: (..., C). weight, bias: (C). Source: DC-AE (Chen et al., 2024).
    """
    out: Tensor = torch.ops.hasten.norm_add(pixels, weight, bias, residual, eps)
    return out


def spread(pixels: Tensor, repeats: int, update: Tensor | None) -> Tensor:
    """Each pixel made four, its channels repeated and dealt out to them, plus the update.

    pixels: (B, H, W, C); update and result: (B, 2 H, 2 W, C * repeats / 4). With repeats 4 that is nearest
    interpolation, with fewer the decoder's shortcut, a pixel_shuffle of repeated channels. Raises ValueError where
    C * repeats is no multiple of 4.
    """
    if pixels.shape[3] * repeats % 4:
        raise ValueError(f"{pixels.shape[3]} channels repeated {repeats} times cannot be dealt out to four pixels.")
    out: Tensor = torch.ops.hasten.spread(pixels, repeats, update)
    return out


def _norm_add_shapes(
    pixels: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> Tensor:  # fmt: skip
    return pixels.new_empty(pixels.shape)


@operation("norm_add", shapes=_norm_add_shapes)
def _norm_add(pixels: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> Tensor:
    if pixels.is_cuda and triton_kernels() is not None:
        return norm_add_by_triton(pixels, weight, bias, residual, eps)
    return norm_add_by_torch(pixels, weight, bias, residual, eps)


def norm_add_by_torch(
    pixels: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> Tensor:  # fmt: skip
    """norm_add by torch's own operations."""
    values = pixels.float()
    out = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * weight.float() + bias.float()
    return (out if residual is None else out + residual.float()).to(pixels.dtype).contiguous()


def norm_add_by_triton(
    pixels: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> Tensor:  # fmt: skip
    """norm_add by its kernel; also the interpreter's way in."""
    module: Any = triton_kernels()
    from hasten.kernels.decoder_triton import norm_add as kernel

    pixels = pixels.contiguous()
    out, width = torch.empty_like(pixels), pixels.shape[-1]
    if not out.numel():
        return out
    count = out.numel() // width
    block = 1 << (width - 1).bit_length()
    rows = max(1, NUMBERS // block)
    module.launch(
        kernel, (-(-count // rows),),
        *(pixels, weight, bias, pixels if residual is None else residual.contiguous(), out, count, width, eps),
        RESIDUAL=residual is not None, ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def _spread_shapes(pixels: Tensor, repeats: int, update: Tensor | None) -> Tensor:
    batch, height, width, channels = pixels.shape
    return pixels.new_empty((batch, 2 * height, 2 * width, channels * repeats // 4))


@operation("spread", shapes=_spread_shapes)
def _spread(pixels: Tensor, repeats: int, update: Tensor | None) -> Tensor:
    if pixels.is_cuda and triton_kernels() is not None:
        return spread_by_triton(pixels, repeats, update)
    return spread_by_torch(pixels, repeats, update)


def spread_by_torch(pixels: Tensor, repeats: int, update: Tensor | None) -> Tensor:
    """spread by torch's own operations."""
    picture = pixels.permute(0, 3, 1, 2).repeat_interleave(repeats, dim=1)
    out = F.pixel_shuffle(picture, 2).permute(0, 2, 3, 1)
    return (out if update is None else out + update).contiguous()


def spread_by_triton(pixels: Tensor, repeats: int, update: Tensor | None) -> Tensor:
    """spread by its kernel; also the interpreter's way in."""
    module: Any = triton_kernels()
    from hasten.kernels.decoder_triton import spread as kernel

    pixels = pixels.contiguous()
    out = _spread_shapes(pixels, repeats, update)
    if not out.numel():
        return out
    batch, height, width, channels = out.shape
    module.launch(
        kernel, (batch * height * -(-width // PIXELS), -(-channels // CHANNELS)),
        *(pixels, pixels if update is None else update.contiguous(), out, height, width, channels, pixels.shape[3]),
        REPEATS=repeats, UPDATE=update is not None, PIXELS=PIXELS, CHANNELS=CHANNELS, num_warps=4,
    )  # fmt: skip
    return out
