"""A FLUX block's modulation: its vector through silu and one or two wide layers, whose weights are what takes time.

For one picture a row goes through weights of (6 C, C) twice or (3 C, C): 6.45 GB a step for FLUX.1-dev in 16 bits.
Floor: each weight once in, 53 and 13.3 us at 4.27 TB/s. On an H200, cold, in CUDA graphs of many calls: 52.5 and 15.9,
by torch with silu 63.9 and 20.2. For two pictures torch's products take as long as for one and a kernel of this kind
took 80 and 20.7: more rows than one, other devices and other dtypes go through torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.operation import operation
from hasten.kernels.row_parts import multiprocessors, power_of_two, triton_kernels, use_triton

WIDEST = 6144  # columns, for silu of all of them stays in a program's registers


def modulation(vector: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """silu(vector) @ weight.T + bias of each layer, (layers, B, O), in vector's dtype; summed in float32.

    vector (B, C); layers: weights (O, C) and biases (O), of one shape.
    """
    out: Tensor = torch.ops.hasten.modulation(vector, [weight for weight, _ in layers], [bias for _, bias in layers])
    return out


def _shapes(vector: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return vector.new_empty((len(weights), vector.shape[0], weights[0].shape[0]))


@operation("modulation", shapes=_shapes)
def _modulation(vector: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    if use_triton(vector) and _fits(vector, weights, biases):
        return modulation_by_triton(vector, weights, biases)
    return modulation_by_torch(vector, weights, biases)


def _fits(vector: Tensor, weights: list[Tensor], biases: list[Tensor]) -> bool:
    """Whether the kernel takes them: one row, one dtype in 16 bits, weights in order on the vector's device."""
    return (
        vector.shape[0] == 1
        and vector.shape[1] <= WIDEST
        and len(weights) <= 2
        and vector.dtype in (torch.bfloat16, torch.float16)
        and all(t.dtype == vector.dtype and t.device == vector.device for t in (*weights, *biases))
        and all(t.is_contiguous() for t in (*weights, *biases))
    )


def modulation_by_torch(vector: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """modulation by torch's own operations, in vector's dtype throughout."""
    given = F.silu(vector)
    return torch.stack([F.linear(given, weight, bias) for weight, bias in zip(weights, biases, strict=True)])


def modulation_by_triton(
    vector: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    rows: int = 0,
    warps: int = 0,
    programs: int = 0,
    stages: int = 0,
) -> Tensor:
    """modulation by its kernel; also the interpreter's way in. One or two layers, one row.

    rows: outputs of one program at a time; programs: that take them in turns; stages: 2 or more to have the next ones
    fetched meanwhile; 0 for what was fastest.
    """
    module: Any = triton_kernels()
    from hasten.kernels.modulation_triton import modulate_rows

    vector = vector.contiguous()
    inner, width = vector.shape[1], weights[0].shape[0]
    out = vector.new_empty((len(weights), 1, width))
    parts = 3 if 3 * power_of_two(-(-inner // 3)) < power_of_two(inner) else 1
    # us for FLUX.1-dev's double and single blocks on an H200: 8 programs on a multiprocessor that take 2 rows at a time
    # 52.5 and 15.9; 4 rows 70 and 18.3, 8 rows 57.7 and 16.2; 4 programs that fetch two turns ahead 52.9 and 15.6.
    rows = rows or 2
    groups = -(-width // rows)
    turns = groups * len(weights)
    most = 8 * multiprocessors(vector.device) if vector.is_cuda else turns
    module.launch(
        modulate_rows,
        (min(programs or most, turns),),
        *(vector, weights[0], weights[-1], biases[0], biases[-1], out, width, groups, len(weights)),
        INNER=inner,
        ROWS=rows,
        BLOCK=power_of_two(-(-inner // parts)),
        PARTS=parts,
        STAGES=stages or 1,
        num_warps=warps or 4,
    )
    return out
