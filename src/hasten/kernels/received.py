"""How much attention each key receives, without the N x N map: column sums of softmax(q k^T), over heads and queries.

Full evaluations keep their fused attention; this second kernel looks at q and k alone, and at some of the queries.
A tile of queries passes over all keys twice: once for its log-sum-exp, once to add up exp(s - lse) by key.
Floor for FLUX.1 at 1024x1024 with 256 queries: 4 x 24 x 256 x 4608 x 128 = 14.5 GFLOP.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

# Scores at a time on the CPU, 16 MB of them: few steps, and still within a processor's larger caches.
SCORES = 2**22


def attention_received(q: Tensor, k: Tensor) -> Tensor:
    """For each key the attention it receives, mean over heads and queries: (B, N) in float32, each row summing to 1.

    q: (B, H, M, D), k: (B, H, N, D) as they go into the attention (normed, rotated), scale D ** -0.5; M queries may be
    some of the N. The same bits every time: no atomics.
    """
    if q.is_cuda and not torch.compiler.is_compiling():
        at_once: Tensor = _on_cuda(q, k)  # a dispatch costs as much as a launch
        return at_once
    received: Tensor = torch.ops.hasten.attention_received(q, k)
    return received


@torch.library.custom_op("hasten::attention_received", mutates_args=())
def _attention_received(q: Tensor, k: Tensor) -> Tensor:
    total = torch.zeros(k.shape[0], k.shape[2], dtype=torch.float32, device=k.device)
    keys, scale = k.float().transpose(-1, -2), q.shape[-1] ** -0.5
    rows = max(1, SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    for first in range(0, q.shape[2], rows):
        total += ((q[:, :, first : first + rows].float() * scale) @ keys).softmax(-1).sum((1, 2))
    return total / (q.shape[1] * q.shape[2])


@_attention_received.register_fake
def _(q: Tensor, k: Tensor) -> Tensor:
    return k.new_empty((k.shape[0], k.shape[2]), dtype=torch.float32)


@_attention_received.register_kernel("cuda")
def _on_cuda(q: Tensor, k: Tensor) -> Tensor:
    kernel = triton_kernel()
    if kernel is not None:
        try:
            with torch.cuda.device(q.device):  # Triton launches on the current device
                return launch(kernel, q, k)
        except Exception as error:  # no C compiler, an old GPU, ...: Triton has no common class for its refusals
            _tell_once(f"{type(error).__name__}: {error}".splitlines()[0])
    received: Tensor = _attention_received._init_fn(q, k)
    return received


@functools.cache
def _tell_once(reason: str) -> None:
    logging.getLogger("hasten").warning("the Triton column sums cannot be used here, torch does them (%s)", reason)


# Programs that keep a large GPU's cores busy several times over (132 of them on an H200).
PROGRAMS = 1024


def launch(kernels: Any, q: Tensor, k: Tensor) -> Tensor:
    """The column sums by the Triton kernels; q (B, H, M, D) and k (B, H, N, D) with D side by side, of 16s."""
    batch, heads, asked, width = q.shape
    keys = k.shape[2]
    if width % 16:
        raise ValueError(f"heads of width {width}: a multiple of 16 is expected")
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    # 64 x 64 tiles in four warps: small enough for any GPU with tensor cores at D = 128.
    rows, columns = 64, 64
    tiles = (asked + rows - 1) // rows
    # Few queries make few tiles: then several programs share a tile's keys.
    wanted = min(max(PROGRAMS // (tiles * batch * heads), 1), (keys + columns - 1) // columns)
    share = ((keys + wanted - 1) // wanted + columns - 1) // columns * columns
    grid = (tiles, (keys + share - 1) // share, batch * heads)
    highs, totals = torch.empty((2, batch * heads, grid[1], asked), dtype=torch.float32, device=k.device)
    parts = torch.empty((batch, heads * tiles, keys), dtype=torch.float32, device=k.device)
    # Base-2 exponentials: log2(e) goes into the scale.
    numbers = (heads, asked, keys, share, width**-0.5 * 1.4426950408889634, *q.stride()[:3], *k.stride()[:3])
    how = {"WIDTH": width, "PADDED": 1 << (width - 1).bit_length(), "ROWS": rows, "COLUMNS": columns, "num_warps": 4}
    kernels.row_sums[grid](q, k, highs, totals, *numbers, **how)
    kernels.column_sums[grid](q, k, highs, totals, parts, *numbers, **how)
    return parts.sum(1) / (heads * asked)


@functools.cache
def triton_kernel() -> Any:
    """The kernels' module, compiled on their first launch; None where Triton is missing."""
    try:
        from hasten.kernels import column_sums
    except ImportError:
        return None
    return column_sums
