"""Sana's linear attention: relu(Q) (relu(K)^T V) over relu(Q) (relu(K)^T 1), summed in float32.

Two passes over what the layers gave out, as it lies: keys and values into one D x D sum a head, queries through it.
Float16's range ends far below such a sum, so nothing leaves float32 in between. Without Triton, or off the GPU, torch
does the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.operation import operation
from hasten.kernels.rows import triton_kernels

# Tokens of one program. A head's sum is split so that all of a GPU works at it: pieces of this many tokens at least.
ROWS, PIECE = 64, 512


def linear_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The attention of each head, (B, N, H * D) in q's dtype.

    q, k, v: (B, N, H * D). Source: Sana (Xie et al., 2024); the denominator's floor is diffusers'.
    """
    out: Tensor = torch.ops.hasten.linear_attention(q, k, v, heads)
    return out


def _shapes(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return q.new_empty(q.shape)


@operation("linear_attention", shapes=_shapes)
def _linear_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    width = q.shape[2] // heads
    if q.is_cuda and triton_kernels() is not None and width >= 16 and not width & (width - 1):
        return linear_attention_by_triton(q, k, v, heads)
    return linear_attention_by_torch(q, k, v, heads)


def linear_attention_by_torch(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """linear_attention by torch's own operations."""
    queries, keys, values = (t.unflatten(2, (heads, -1)).transpose(1, 2).float() for t in (q, k, v))
    queries, keys = F.relu(queries), F.relu(keys)
    sums = keys.transpose(2, 3) @ F.pad(values, (0, 1), value=1.0)
    out = queries @ sums
    out = out[..., :-1] / (out[..., -1:] + 1e-15)
    return out.transpose(1, 2).flatten(2).to(q.dtype)


def linear_attention_by_triton(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """linear_attention by its kernels; also the interpreter's way in. A head's width must be a power of two."""
    module: Any = triton_kernels()
    from hasten.kernels import sana_triton

    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch, tokens, inner = q.shape
    width, pieces = inner // heads, max(1, min(16, tokens // PIECE))
    out = torch.empty_like(q)
    if not out.numel():
        return out
    sums = torch.empty((batch * heads, pieces, width + 1, width), dtype=torch.float32, device=q.device)
    rows = ROWS * -(-tokens // (pieces * ROWS))  # of a piece
    module.launch(
        sana_triton.sum_keys, (batch * heads, pieces), *(k, v, sums, tokens, heads, pieces, rows),
        ROWS=ROWS, WIDTH=width, num_warps=4,
    )  # fmt: skip
    module.launch(
        sana_triton.apply_sums, (batch * heads, -(-tokens // ROWS)), *(q, sums, out, tokens, heads, pieces),
        ROWS=ROWS, WIDTH=width, num_warps=4,
    )  # fmt: skip
    return out
