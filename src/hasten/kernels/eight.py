"""q, k, v in 8 bits, as attention8.py multiplies them: int8 rows of q and k, e4m3 columns of v, and their steps.

Floor, for B 1, H 24, D 128: q, k, v read once and written in 8 bits, 9 bytes for each of N H D numbers: 127 MB at
N = 4608, 30 us at 4.2 TB/s.

K is taken less one constant vector a head (softmax does not see it): its outlying channels are mostly that. Q has a
step for each row, K one for each 128 rows. V, too, is taken less a constant, which is added to the result (what is left
cancels, and the tensor cores' few bits are enough), in e4m3 with one step for each 128 rows.
Source of the scheme: SageAttention 1 and 2 (Zhang et al., 2024); the kernels are our own.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 128
HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class Norm:
    """RMS norm of q and k over the head's channels, each weight (D,); the text's own where it comes apart."""

    q: Tensor
    k: Tensor
    eps: float
    text_q: Tensor | None = None
    text_k: Tensor | None = None


@dataclass(frozen=True)
class Rope:
    """Rotation of channel pairs (0, 1), (2, 3), ...: cos and sin (N, D / 2), or (N, D) with each value twice."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Eight:
    """What `prepare` leaves: int8 q and k (B H, P, D), e4m3 v turned (B H, D, P), P a multiple of 128; float32 steps.

    q_scale (B H, P) holds the softmax scale and log2 e; k_scale and v_scale (B H, P / 128). q_length (B H, P),
    with the softmax scale and log2 e, and k_length (B H, P / 128), the longest of a block: how long rows are.
    v_mean (B H, D) was taken off every value and is added to what comes out. order: see `prepare`; what is attended to
    comes back in the rows' own order.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor | None
    v_scale: Tensor | None
    v_mean: Tensor | None
    q_length: Tensor | None
    k_length: Tensor | None
    means: Means | None
    batch: int
    heads: int
    rows: int
    scale: float
    order: Tensor | None = None

    @property
    def padded(self) -> int:
        """The rows of the 8-bit tensors."""
        return self.q.shape[1]


@dataclass(frozen=True)
class Means:
    """For blocks of 128 rows: the mean row (B H, P / 128, D) and how alike the rows are, 0 to 1 (B H, P / 128), if it
    was asked for."""

    q: Tensor
    q_alike: Tensor | None
    k: Tensor
    k_alike: Tensor | None


def prepare(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, fp8: bool = True, means: bool = False,
    alike: bool = True, text: tuple[Tensor, Tensor, Tensor] | None = None, norm: Norm | None = None,
    rope: Rope | None = None, order: Tensor | None = None,
) -> Eight:  # fmt: skip
    """q, k, v, each (B, H, N, D) with any strides but a dense last one, in 8 bits; `text`'s rows come first.

    norm and rope are taken on the way, in float32, where they are given. scale: the softmax's, 1 / sqrt(D) by default.
    means: the mean rows of blocks too, and with `alike` how alike their rows are.
    order (N,) int32: which row is read at each place, all of them once; the text's first, as they are.
    """
    batch, heads, image_rows, dim = q.shape
    text_rows = 0 if text is None else text[0].shape[2]
    rows = image_rows + text_rows
    padded = (rows + BLOCK - 1) // BLOCK * BLOCK
    scale = dim**-0.5 if scale is None else scale
    blocks, both = padded // BLOCK, batch * heads
    made = functools.partial(torch.empty, device=q.device)
    q8, k8 = made((2, both, padded, dim), dtype=torch.int8).unbind()
    # One allocation for every small table: at short lengths it is the host that decides how long this takes.
    sizes = [0 if rope is None else padded * dim // 2]
    sizes += [both * n for n in (dim, dim, padded, blocks, blocks, padded, blocks)]
    small = made(sum(sizes), dtype=torch.float32).split(sizes)
    turns, mean, v_mean, q_scale, k_scale, v_scale, q_length, k_length = small
    v8 = made((both, dim, padded), dtype=torch.float8_e4m3fn) if fp8 else None
    found = None
    if means:
        rows_mean = made((2, both, blocks, dim), dtype=torch.float32)
        likeness = made((2, both, blocks), dtype=torch.float32) if alike else (None, None)
        found = Means(rows_mean[0], likeness[0], rows_mean[1], likeness[1])
    tables = (None,) * 4 if found is None else (found.q, found.q_alike, found.k, found.k_alike)
    of_blocks = [mean if table is None else table for table in tables]
    texts = (q, k, v) if text is None else text
    gains: tuple[Tensor, ...] = (q, k, q, k)
    if norm is not None:
        gains = (norm.q, norm.k, *(norm.q if w is None else w for w in (norm.text_q, norm.text_k)))
    cos, sin = (mean, mean) if rope is None else (rope.cos, rope.sin)
    assert cos.stride() == sin.stride()
    pairs = (0, 1) if rope is None else (cos.stride(0), cos.stride(1) * (1 if cos.shape[-1] * 2 == dim else 2))
    eps = 0.0 if norm is None else norm.eps
    options: dict[str, Any] = {"D": dim, "NORM": norm is not None, "ROPE": rope is not None}
    split = 2 if text_rows % BLOCK or order is not None else 1  # 1: no block of rows has both text and image
    kernels = _kernels()
    constants = both * (5 if fp8 else 1)  # values' by quarters of the channels
    kernels.first[(constants + (0 if rope is None else blocks),)](
        k, texts[1], v, texts[2], gains[1], gains[3], cos, sin, mean, v_mean, turns.view(torch.float16),
        *(t.stride(i) for t in (k, texts[1], v, texts[2]) for i in range(3)), *pairs, heads, both, constants,
        rows, padded, text_rows, eps, **options, TEXT=0 if text is None else 2, num_warps=8,
    )  # fmt: skip
    # Measured on an H200: 8 warps have room for what a rotation holds, and two blocks are at work at once, three where
    # 80 registers will do; 4 are faster where sums over the rows of a block go through all warps.
    warps = 4 if means else 8
    few = {"maxnreg": 80} if rope is None and norm is None and not means and torch.version.hip is None else {}
    kernels.prepare[(heads, batch * (3 if fp8 else 2), blocks)](
        q, k, v, *texts, *gains, turns.view(torch.float16), q_scale if order is None else order, mean, v_mean, q8,
        q_scale, k8, k_scale, q8 if v8 is None else v8, v_scale, q_length, k_length, *of_blocks,
        *(t.stride(i) for t in (q, k, v, *texts) for i in range(3)), heads, rows, padded, text_rows,
        scale * math.log2(math.e), eps, **options, TEXT=0 if text is None else split, FP8=fp8,
        SPARSE=(2 if alike else 1) if means else 0, ORDER=order is not None, num_warps=warps, **few,
    )  # fmt: skip
    if not fp8:
        return Eight(q8, q_scale, k8, k_scale, None, None, None, None, None, found, batch, heads, rows, scale, order)
    return Eight(
        q8, q_scale, k8, k_scale, v8, v_scale, v_mean, q_length, k_length, found, batch, heads, rows, scale, order
    )


@functools.cache
def _kernels() -> Any:
    from hasten.kernels import eight_triton

    return eight_triton
