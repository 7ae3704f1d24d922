"""The Triton kernels behind eight_rows.py. Importing this module needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_rows(  # type: ignore[no-untyped-def]
    rows, data, scale, index, width, largest, smallest, CHOSEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(index + row) if CHOSEN else row
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(rows + row * width + at, mask=inside, other=0.0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(values), 0) / largest, smallest)
    values = tl.minimum(tl.maximum(values / step, -largest), largest)
    tl.store(data + target * width + at, values.to(data.dtype.element_ty), mask=inside)
    tl.store(scale + target, step)


@triton.jit
def unpack_rows(  # type: ignore[no-untyped-def]
    data, scale, index, out, width, CHOSEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index + row) if CHOSEN else row
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(data + source * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (values * tl.load(scale + source)).to(out.dtype.element_ty), mask=inside)
