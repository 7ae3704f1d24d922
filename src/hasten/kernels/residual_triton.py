"""The Triton side of residual_sums.py. Importing this module needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def change_parts(  # type: ignore[no-untyped-def]
    image, entry, before, parts, count, rounds, PREVIOUS: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Each program's share of sum |image - entry - before| and of sum |before| (or |image - entry|)."""
    first = tl.program_id(0).to(tl.int64) * rounds * BLOCK
    moved = tl.zeros((BLOCK,), tl.float32)
    scale = tl.zeros((BLOCK,), tl.float32)
    for step in range(rounds):
        at = first + step * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        new = tl.load(image + at, mask=inside, other=0.0).to(tl.float32)
        new -= tl.load(entry + at, mask=inside, other=0.0).to(tl.float32)
        new = new.to(image.dtype.element_ty).to(tl.float32)  # rounded as the tensor that is kept
        old = tl.load(before + at, mask=inside, other=0.0).to(tl.float32)
        moved += tl.abs((new - old).to(image.dtype.element_ty).to(tl.float32))
        scale += tl.abs(old) if PREVIOUS else tl.abs(new)
    tl.store(parts + tl.program_id(0), tl.sum(moved, 0))
    tl.store(parts + PROGRAMS + tl.program_id(0), tl.sum(scale, 0))


@triton.jit
def change_whole(parts, change, programs, PROGRAMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The programs' sums as one number: 0 over 0 is no change, anything over 0 is infinite."""
    at = tl.arange(0, PROGRAMS)
    moved = tl.sum(tl.load(parts + at, mask=at < programs, other=0.0), 0)
    scale = tl.sum(tl.load(parts + PROGRAMS + at, mask=at < programs, other=0.0), 0)
    ratio = moved / tl.where(scale == 0.0, 1.0, scale)
    ratio = tl.where((scale == 0.0) & (moved > 0.0), float("inf"), ratio)
    tl.store(change, tl.where(moved == 0.0, 0.0, ratio))
