"""Element-wise work of a FLUX block, each piece one pass over its rows, as operations that torch.compile sees through.

norm + modulate + largest value + cast; the same with the gated residual before it; gelu beside the attention's output;
query and key norm + rotation. Rows of two streams go through one launch: text first, then image. Their order in what
comes out is either "joint" (one sequence, batch after batch) or "apart" (all text rows, then all image rows), so that
each stream's linear layers see one matrix.

Floor: every tensor once in and once out. For FLUX.1-dev at 1024x1024 a stream of 4608 x 3072 in 16 bits is 28.3 MB,
6.6 us at 4.27 TB/s. Without Triton, or off the GPU, the same arithmetic is done by torch in float32.

Every norm of FLUX has an epsilon of 1e-6. It stands as a literal where it is passed: a default or a module's attribute
is a number that the compiler leaves open at first, and for which it then compiles the graph a second time.
"""

from __future__ import annotations

from hasten.kernels.gelu_rows import (
    gelu_beside,
    gelu_beside_by_torch,
    gelu_beside_by_triton,
    split_streams,
    split_streams_by_torch,
    split_streams_by_triton,
)
from hasten.kernels.norm_rope import (
    norm_rope,
    norm_rope_by_torch,
    norm_rope_by_triton,
    streams_of,
    values_of,
)
from hasten.kernels.residual_norm import (
    add_gated,
    add_gated_by_torch,
    add_gated_by_triton,
    add_norm_modulate,
    add_norm_modulate_by_torch,
    add_norm_modulate_by_triton,
    norm_modulate,
    norm_modulate_by_torch,
    norm_modulate_by_triton,
)
from hasten.kernels.row_parts import (
    FP8,
    LIMITS,
    quantise,
    triton_kernels,
)

__all__ = [
    "FP8",
    "LIMITS",
    "add_gated",
    "add_gated_by_torch",
    "add_gated_by_triton",
    "add_norm_modulate",
    "add_norm_modulate_by_torch",
    "add_norm_modulate_by_triton",
    "gelu_beside",
    "gelu_beside_by_torch",
    "gelu_beside_by_triton",
    "norm_modulate",
    "norm_modulate_by_torch",
    "norm_modulate_by_triton",
    "norm_rope",
    "norm_rope_by_torch",
    "norm_rope_by_triton",
    "quantise",
    "split_streams",
    "split_streams_by_torch",
    "split_streams_by_triton",
    "streams_of",
    "triton_kernels",
    "values_of",
]
