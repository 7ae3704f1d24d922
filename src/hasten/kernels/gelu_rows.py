"""GELU beside what the attention gave out, and two streams taken apart, in 8 bits where asked for; see rows.py."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.operation import operation
from hasten.kernels.row_parts import (
    LIMITS,
    arranged,
    dense_last,
    empty_rows,
    finished,
    multiprocessors,
    power_of_two,
    triton_kernels,
    use_triton,
)


def gelu_beside(before: Tensor | None, hidden: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """[before, gelu(hidden)] row by row, (R, C + M), and its scales; gelu in its tanh form.

    before (R, C) or None, hidden (R, M); rows may lie apart. dtype as in norm_modulate.
    """
    out: tuple[Tensor, Tensor] = torch.ops.hasten.gelu_beside(before, hidden, dtype or hidden.dtype)
    return out


def split_streams(joint: Tensor, length: int, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Rows of (B, S, C), the first `length` of each sequence being text: all text rows, then all image rows."""
    out: tuple[Tensor, Tensor] = torch.ops.hasten.split_streams(joint, length, dtype or joint.dtype)
    return out


def _gelu_beside_shapes(before: Tensor | None, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    width = hidden.shape[1] + (0 if before is None else before.shape[1])
    return empty_rows(hidden, hidden.shape[0], width, dtype)


@operation("gelu_beside", shapes=_gelu_beside_shapes)
def _gelu_beside(before: Tensor | None, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if use_triton(hidden):
        return gelu_beside_by_triton(before, hidden, dtype)
    return gelu_beside_by_torch(before, hidden, dtype)


def gelu_beside_by_torch(before: Tensor | None, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """gelu_beside by torch's own operations."""
    values = torch.nn.functional.gelu(hidden.float(), approximate="tanh")
    return finished(values if before is None else torch.cat([before.float(), values], -1), dtype)


def gelu_beside_by_triton(
    before: Tensor | None,
    hidden: Tensor,
    dtype: torch.dtype,
    *,
    warps: int = 0,
    parts: int = 0,
    programs: int = 0,
    stages: int = 0,
    fast: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """gelu_beside by its kernel; also the interpreter's way in. warps, parts, programs, stages: 0 for what was fastest.

    programs: that take the rows in turns; stages: 2 or more to have the next rows fetched meanwhile.

    fast: the GPU's own tanh, for rows in 8 bits on NVIDIA GPUs if left out.
    """
    module = triton_kernels()
    hidden = dense_last(hidden)
    head = hidden if before is None else dense_last(before)
    head_width = 0 if before is None else head.shape[1]
    count, width = hidden.shape
    rows, scales = empty_rows(hidden, count, head_width + width, dtype)
    parts = parts or _parts(width)
    block = power_of_two(-(-width // parts))
    warps = warps or max(4, min(8, block // 256))
    own = hidden.is_cuda and torch.version.cuda is not None
    # 12288 channels in fp8 on an H200, us beside 3072 others and alone: a row for each program 132 and 82; two programs
    # on each multiprocessor that fetch two rows ahead 102 and 64, one row ahead 113 and 75.
    programs = programs or min(count, 2 * multiprocessors(hidden.device) if own else count)
    stages = stages or (3 if own and block <= 4096 else 1)
    if count:
        module.launch(
            module.gelu_row,
            (programs,),
            *(head, hidden, rows, scales, count, head.stride(0), hidden.stride(0)),
            BEFORE_WIDTH=head_width,
            WIDTH=width,
            BEFORE=before is not None,
            QUANTISES=dtype in LIMITS,
            BLOCK_BEFORE=power_of_two(max(head_width, 1)),
            BLOCK=block,
            PARTS=parts,
            STAGES=stages,
            FAST=own and dtype in LIMITS if fast is None else fast,
            num_warps=warps,
        )
    return rows, scales


def _parts(width: int) -> int:
    """Into how many blocks of a power of two, 1, 3 or 4, a row goes with the fewest columns beyond its end."""
    return min((1, 3, 4), key=lambda n: (n * power_of_two(-(-width // n)), n))


def _split_streams_shapes(joint: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return empty_rows(joint, joint.shape[0] * joint.shape[1], joint.shape[2], dtype)


@operation("split_streams", shapes=_split_streams_shapes)
def _split_streams(joint: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if use_triton(joint):
        return split_streams_by_triton(joint, length, dtype)
    return split_streams_by_torch(joint, length, dtype)


def split_streams_by_torch(joint: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """split_streams by torch's own operations."""
    return finished(arranged(joint[:, :length].float(), joint[:, length:].float(), joint=False), dtype)


def split_streams_by_triton(joint: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """split_streams by its kernel; also the interpreter's way in."""
    module = triton_kernels()
    joint = dense_last(joint)
    batch, total, width = joint.shape
    rows, scales = empty_rows(joint, batch * total, width, dtype)
    if batch * total:
        module.launch(
            module.split_row,
            (total, batch),
            *(joint, rows, scales, length, total - length, batch, width, joint.stride(0), joint.stride(1)),
            QUANTISES=dtype in LIMITS,
            BLOCK=power_of_two(width),
            num_warps=8,
        )
    return rows, scales
