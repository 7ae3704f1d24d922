"""Sana's feed-forward between its two wide layers: a 3x3 convolution of each channel by itself, and the gate.

The tokens stay as they lie, (B, N, 2 C): no turning into channels first and back. Floor: the tensor once in, half of it
out; for the 1600M at 1024x1024 with guidance that is 46 + 23 MB a block, 16 us at 4.27 TB/s. Without Triton, or off
the GPU, torch does the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.operation import operation
from hasten.kernels.rows import triton_kernels

# Pixels and channels of one program: neighbours share their rows in the first cache.
TILE_Y, TILE_X, CHANNELS = 4, 8, 64


def gated_conv(hidden: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """a * silu(b) of the two halves of the convolution's channels, (B, N, C), in hidden's dtype; float32 in between.

    hidden: (B, height * width, 2 C), row by row. weight: (2 C, 1, 3, 3), bias: (2 C), as of nn.Conv2d with as many
    groups as channels; zeros lie around the picture. Source: Sana (Xie et al., 2024), Mix-FFN.
    """
    out: Tensor = torch.ops.hasten.gated_conv(hidden, weight, bias, height, width)
    return out


def _shapes(hidden: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    return hidden.new_empty((hidden.shape[0], hidden.shape[1], hidden.shape[2] // 2))


@operation("gated_conv", shapes=_shapes)
def _gated_conv(hidden: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    if hidden.is_cuda and triton_kernels() is not None:
        return gated_conv_by_triton(hidden, weight, bias, height, width)
    return gated_conv_by_torch(hidden, weight, bias, height, width)


def gated_conv_by_torch(hidden: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """gated_conv by torch's own operations, in hidden's dtype throughout."""
    picture = hidden.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    value, gate = F.conv2d(picture, weight, bias, padding=1, groups=weight.shape[0]).chunk(2, dim=1)
    return (value * F.silu(gate)).flatten(2).transpose(1, 2).contiguous()


def gated_conv_by_triton(hidden: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """gated_conv by its kernel; also the interpreter's way in."""
    module: Any = triton_kernels()
    from hasten.kernels.sana_triton import gated_conv as kernel

    # Each of the nine weights beside its neighbours', so that a program reads them at once.
    hidden, weight, bias = hidden.contiguous(), weight.flatten(1).t().contiguous(), bias.contiguous()
    batch, tokens, both = hidden.shape
    out = hidden.new_empty((batch, tokens, both // 2))
    if not out.numel():
        return out
    tiles = -(-height // TILE_Y) * -(-width // TILE_X)
    module.launch(
        kernel,
        (tiles, -(-(both // 2) // CHANNELS), batch),
        *(hidden, weight, bias, out, height, width, both // 2),
        TILE_Y=TILE_Y,
        TILE_X=TILE_X,
        CHANNELS=CHANNELS,
        num_warps=4,
    )
    return out
