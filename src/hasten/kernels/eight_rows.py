"""Rows of numbers in float8_e4m3 with one float32 scale each: written and read, all of them or some, in one pass.

Floor for FLUX.1 at 1024x1024 in bfloat16: 28.3 MB read and 14.2 MB written, or the other way round, 10 us at 4.2 TB/s.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
SMALLEST = 1e-12  # a scale that nothing is divided by zero with


def pack(rows: Tensor, data: Tensor, scale: Tensor, index: Tensor | None = None) -> None:
    """Writes rows, (..., C), into data, (N, C) of float8, and their scales into scale, (N, 1): the first ones, or those
    of index, (k,)."""
    rows = rows.reshape(-1, rows.shape[-1])
    if not _in_triton(rows, lambda kernels: launch_pack(kernels, rows, data, scale, index)):
        pack_in_torch(rows, data, scale, index)


def unpack(data: Tensor, scale: Tensor, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
    """The rows of data, (N, C), or those of index, (k,), in that dtype."""
    count = data.shape[0] if index is None else index.shape[0]
    out = torch.empty((count, data.shape[1]), dtype=dtype, device=data.device)
    if not _in_triton(data, lambda kernels: launch_unpack(kernels, data, scale, index, out)):
        return unpack_in_torch(data, scale, dtype, index)
    return out


def pack_in_torch(rows: Tensor, data: Tensor, scale: Tensor, index: Tensor | None) -> None:
    """The same by torch."""
    largest = rows.abs().amax(-1, keepdim=True).to(torch.float32)
    steps = (largest / LARGEST).clamp_min(SMALLEST)
    values = (rows.to(torch.float32) / steps).clamp_(-LARGEST, LARGEST).to(FP8)
    if index is None:
        data.copy_(values)
        scale.copy_(steps)
    else:  # copying by index is not made for float8
        data.view(torch.uint8).index_copy_(0, index, values.view(torch.uint8))
        scale.index_copy_(0, index, steps)


def unpack_in_torch(data: Tensor, scale: Tensor, dtype: torch.dtype, index: Tensor | None) -> Tensor:
    """The same by torch."""
    if index is not None:
        data, scale = data.view(torch.uint8).index_select(0, index).view(FP8), scale.index_select(0, index)
    return (data.to(torch.float32) * scale).to(dtype)


def _in_triton(like: Tensor, launch: Callable[[Any], None]) -> bool:
    kernels = triton_kernels() if like.is_cuda and not torch.compiler.is_compiling() else None
    if kernels is None:
        return False
    try:
        with torch.cuda.device(like.device):  # Triton launches on the current device
            launch(kernels)
        return True
    except Exception as error:  # no C compiler, a GPU without float8, ...: Triton has no common class for its refusals
        _tell_once(f"{type(error).__name__}: {error}".splitlines()[0])
        return False


@functools.cache
def _tell_once(reason: str) -> None:
    logging.getLogger("hasten").warning("the Triton float8 rows cannot be used here, torch does it (%s)", reason)


def launch_pack(kernels: Any, rows: Tensor, data: Tensor, scale: Tensor, index: Tensor | None) -> None:
    """By the Triton kernel."""
    rows, width = rows.contiguous(), rows.shape[1]
    kernels.pack_rows[(rows.shape[0],)](
        rows, data, scale, rows if index is None else index, width, LARGEST, SMALLEST,
        CHOSEN=index is not None, BLOCK=1 << (width - 1).bit_length(),
    )  # fmt: skip


def launch_unpack(kernels: Any, data: Tensor, scale: Tensor, index: Tensor | None, out: Tensor) -> None:
    """By the Triton kernel."""
    width = data.shape[1]
    kernels.unpack_rows[(out.shape[0],)](
        data, scale, data if index is None else index, out, width,
        CHOSEN=index is not None, BLOCK=1 << (width - 1).bit_length(),
    )  # fmt: skip


@functools.cache
def triton_kernels() -> Any:
    """The kernels' module, compiled on their first launch; None where Triton is missing."""
    try:
        from hasten.kernels import eight_rows_triton
    except ImportError:
        return None
    return eight_rows_triton
