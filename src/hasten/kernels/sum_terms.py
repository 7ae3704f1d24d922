"""The Triton kernel behind weighted_sum. Importing this module needs Triton.

`tl` is a name of the module, as Triton asks for: not every version resolves names that a kernel closes over.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_terms(  # type: ignore[no-untyped-def]
    out, base, d0, d1, d2, d3, d4, d5, d6, d7, w0, w1, w2, w3, w4, w5, w6, w7, count,
    TERMS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(base + at, mask=inside).to(tl.float32)
    total += w0 * tl.load(d0 + at, mask=inside).to(tl.float32)
    if TERMS > 1:
        total += w1 * tl.load(d1 + at, mask=inside).to(tl.float32)
    if TERMS > 2:
        total += w2 * tl.load(d2 + at, mask=inside).to(tl.float32)
    if TERMS > 3:
        total += w3 * tl.load(d3 + at, mask=inside).to(tl.float32)
    if TERMS > 4:
        total += w4 * tl.load(d4 + at, mask=inside).to(tl.float32)
    if TERMS > 5:
        total += w5 * tl.load(d5 + at, mask=inside).to(tl.float32)
    if TERMS > 6:
        total += w6 * tl.load(d6 + at, mask=inside).to(tl.float32)
    if TERMS > 7:
        total += w7 * tl.load(d7 + at, mask=inside).to(tl.float32)
    if HALF:  # as torch clamps: NaN is neither above nor below, and stays
        total = tl.where(total > 65504.0, 65504.0, total)
        total = tl.where(total < -65504.0, -65504.0, total)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
