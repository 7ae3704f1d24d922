"""The Triton side of modulation.py. Imported on first use only, for Triton may be missing."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _silu(x, first, INNER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = first + tl.arange(0, BLOCK)
    values = tl.load(x + column, mask=column < INNER, other=0.0).to(tl.float32)
    return (values / (1.0 + tl.exp(-values)))[None, :]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _read(rows, known, first, INNER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some columns of a few rows, which nobody reads again: what others want to find in the caches stays there."""
    column = first + tl.arange(0, BLOCK)
    inside = known[:, None] & (column < INNER)[None, :]
    return tl.load(rows + column[None, :], mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def modulate_rows(  # type: ignore[no-untyped-def]
    x, weight0, weight1, bias0, bias1, out, width, groups, layers,
    INNER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """silu(x) times the rows of one or two layers' weights, ROWS of them in a turn. out: (layers, width).

    A program keeps silu(x), which lies in 1 or 3 blocks of columns, in registers."""
    x0 = _silu(x, 0, INNER, BLOCK)
    if PARTS == 3:
        x1 = _silu(x, BLOCK, INNER, BLOCK)
        x2 = _silu(x, 2 * BLOCK, INNER, BLOCK)
    for turn in tl.range(tl.program_id(0), groups * layers, tl.num_programs(0), num_stages=STAGES):
        second = turn >= groups
        row = tl.where(second, turn - groups, turn) * ROWS + tl.arange(0, ROWS)
        known = row < width
        weight = tl.where(second, weight1, weight0) + row.to(tl.int64)[:, None] * INNER
        sums = _read(weight, known, 0, INNER, BLOCK) * x0
        if PARTS == 3:  # column by column first: one sum over all threads
            sums += _read(weight, known, BLOCK, INNER, BLOCK) * x1
            sums += _read(weight, known, 2 * BLOCK, INNER, BLOCK) * x2
        bias = tl.load(tl.where(second, bias1, bias0) + row, mask=known, other=0.0).to(tl.float32)
        target = out + tl.where(second, width, 0) + row
        tl.store(target, (tl.sum(sums, 1) + bias).to(out.dtype.element_ty), mask=known)
