"""What the passes over rows share: the order of two streams' rows, rows in 8 bits, and how a launch is laid out."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LIMITS = {FP8: 448.0, torch.int8: 127.0}


@functools.cache
def triton_kernels() -> Any:
    """The module of Triton kernels, or None where Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        return None
    from hasten.kernels import rows_triton

    return rows_triton


def quantise(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of (R, C) as `dtype` and their scales (R, 1) in float32: values = rows * scales.

    The scale is a row's largest size over the dtype's largest number. NaN and infinity make their row NaN.
    """
    values = values.float()
    largest = values.abs().amax(-1, keepdim=True)
    scales = largest.clamp(min=1e-12) / LIMITS[dtype]
    if dtype == torch.int8:
        return (values / scales).nan_to_num(0.0).round().clamp(-128, 127).to(dtype), scales
    return (values / scales).to(dtype), scales


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def use_triton(x: Tensor) -> bool:
    """Whether kernels can run on this tensor."""
    return x.is_cuda and triton_kernels() is not None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def dense_last(x: Tensor) -> Tensor:
    """The tensor, copied unless its last dimension is dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_rows(x: Tensor, count: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for rows and for their scales; rows that are not quantised have none."""
    scales = (count, 1) if dtype in LIMITS else (0, 1)
    return x.new_empty((count, width), dtype=dtype), x.new_empty(scales, dtype=torch.float32)


def arranged(text: Tensor, image: Tensor, joint: bool) -> Tensor:
    """Rows (B * (L + N), C) of two streams."""
    if joint:
        return torch.cat([text, image], 1).flatten(0, 1)
    return torch.cat([text.flatten(0, 1), image.flatten(0, 1)])


def streams_apart(rows: Tensor, batch: int, length: int, joint: bool) -> tuple[Tensor, Tensor]:
    """The inverse of `arranged`."""
    total, width = rows.shape[0] // batch, rows.shape[1]
    if joint:
        both = rows.view(batch, total, width)
        return both[:, :length], both[:, length:]
    text, image = rows[: batch * length], rows[batch * length :]
    return text.view(batch, length, width), image.view(batch, total - length, width)


def finished(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows and scales of float32 values: in 8 bits if `dtype` is, else cast and without scales."""
    if dtype in LIMITS:
        return quantise(values, dtype)
    return values.to(dtype), values.new_empty((0, 1), dtype=torch.float32)
