"""Rotary positions: pairs of the last axis turned by their angle, read once and written once."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with its pairs (2i, 2i + 1) of the last axis turned by their angle; x's dtype.

    x: (B, H, N, D). cos, sin: (N, D / 2), (1, 1, N, D / 2) or (B, 1, N, D / 2). Source: FLUX.1, math.py.
    """
    dense = x.is_contiguous() or x.transpose(1, 2).is_contiguous()
    given = (x if dense else x.contiguous(), cos.float().contiguous(), sin.float().contiguous())
    if x.is_cuda and not torch.compiler.is_compiling():
        at_once: Tensor = _on_cuda(*given)  # a dispatch costs as much as a launch
        return at_once
    turned: Tensor = torch.ops.hasten.rotated(*given)
    return turned


@torch.library.custom_op("hasten::rotated", mutates_args=())
def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.float().unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


@_rotated.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x)


@_rotated.register_kernel("cuda")
def _on_cuda(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    kernel = triton_kernel()
    if kernel is not None:
        try:
            with torch.cuda.device(x.device):  # Triton launches on the current device
                return launch(kernel, x, cos, sin)
        except Exception as error:  # no C compiler, an old GPU, ...: Triton has no common class for its refusals
            _tell_once(f"{type(error).__name__}: {error}".splitlines()[0])
    turned: Tensor = _rotated._init_fn(x, cos, sin)
    return turned


@functools.cache
def _tell_once(reason: str) -> None:
    logging.getLogger("hasten").warning("the Triton rotation cannot be used here, torch does it (%s)", reason)


def launch(kernel: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation by the Triton kernel; x contiguous as it is or as (B, N, H, D), the result alike."""
    batch, heads, tokens, width = x.shape
    out, rows, half = torch.empty_like(x), batch * heads * tokens, width // 2
    block = 32
    kernel[((rows + block - 1) // block,)](
        out, x, cos, sin, rows, tokens, cos.numel() // (tokens * half), heads,
        BY_TOKEN=not x.is_contiguous(), ROWS=block, HALF=half, PADDED=1 << (half - 1).bit_length(),
    )  # fmt: skip
    return out


@functools.cache
def triton_kernel() -> Any:
    """The kernel, compiled on its first launch; None where Triton is missing."""
    try:
        from hasten.kernels.token_rows import rotate_pairs
    except ImportError:
        return None
    return rotate_pairs
