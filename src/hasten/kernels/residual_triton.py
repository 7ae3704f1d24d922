"""The Triton side of residual_sums.py. Importing this module needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def change_of(  # type: ignore[no-untyped-def]
    image, entry, before, parts, change, arrived, count, rounds,
    PREVIOUS: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program's share of sum |image - entry - before| and of sum |before| (or |image - entry|); whichever comes to
    its end last makes one number of them, in their order: 0 over 0 is no change, anything over 0 is infinite.

    arrived: how many came to their end, 0 before and after."""
    program = tl.program_id(0)
    first = program.to(tl.int64) * rounds * BLOCK
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
    tl.store(parts + program, tl.sum(moved, 0))
    tl.store(parts + PROGRAMS + program, tl.sum(scale, 0))
    tl.debug_barrier()  # all of this program's threads have written before one says so
    programs = tl.num_programs(0)
    if tl.atomic_add(arrived, 1) == programs - 1:
        place = tl.arange(0, PROGRAMS)
        # From L2, where the others wrote: a multiprocessor's own cache is not told of it.
        all_moved = tl.sum(tl.load(parts + place, mask=place < programs, other=0.0, cache_modifier=".cg"), 0)
        all_scale = tl.sum(tl.load(parts + PROGRAMS + place, mask=place < programs, other=0.0, cache_modifier=".cg"), 0)
        ratio = all_moved / tl.where(all_scale == 0.0, 1.0, all_scale)
        ratio = tl.where((all_scale == 0.0) & (all_moved > 0.0), float("inf"), ratio)
        tl.store(change, tl.where(all_moved == 0.0, 0.0, ratio))
        tl.atomic_xchg(arrived, 0)
