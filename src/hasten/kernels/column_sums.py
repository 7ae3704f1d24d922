"""The Triton kernels behind attention_received. Importing this module needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_sums(  # type: ignore[no-untyped-def]
    q, k, highs, totals, heads, asked, keys, share, scale, q_batch, q_head, q_row, k_batch, k_head, k_row,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """For a tile of queries and a share of the keys: each row's highest score, and its sum of exp2(s - highest)."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    both = tl.program_id(2).to(tl.int64)
    batch, head = both // heads, both % heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    width = tl.arange(0, PADDED)
    columns = tl.arange(0, COLUMNS)
    within = (rows < asked)[:, None] & (width < WIDTH)[None, :]
    queries_at = q + batch * q_batch + head * q_head
    queries = tl.load(queries_at + rows[:, None] * q_row + width[None, :], mask=within, other=0.0)
    keys_at = k + batch * k_batch + head * k_head
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    begin = part * share
    end = tl.minimum(begin + share, keys)
    for first in range(begin, end, COLUMNS):
        at = first + columns
        inside = (width < WIDTH)[:, None] & (at < end)[None, :]
        some = tl.load(keys_at + at[None, :].to(tl.int64) * k_row + width[:, None], mask=inside, other=0.0)
        scores = tl.dot(queries, some) * scale
        scores = tl.where((at < end)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        highest = higher
    out = (both * tl.num_programs(1) + part) * asked + rows
    tl.store(highs + out, highest, mask=rows < asked)
    tl.store(totals + out, total, mask=rows < asked)


@triton.jit
def column_sums(  # type: ignore[no-untyped-def]
    q, k, highs, totals, parts, heads, asked, keys, share, scale, q_batch, q_head, q_row, k_batch, k_head, k_row,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """For a tile of queries and a share of the keys: what each key receives from the tile's rows."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    both = tl.program_id(2).to(tl.int64)
    batch, head = both // heads, both % heads
    rows = tile * ROWS + tl.arange(0, ROWS)
    width = tl.arange(0, PADDED)
    columns = tl.arange(0, COLUMNS)
    # The shares' sums into one log-sum-exp a row, in base 2.
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for other in range(0, tl.num_programs(1)):
        found = (both * tl.num_programs(1) + other) * asked + rows
        high = tl.load(highs + found, mask=rows < asked, other=0.0)
        higher = tl.maximum(highest, high)
        own = tl.load(totals + found, mask=rows < asked, other=1.0)
        total = total * tl.exp2(highest - higher) + own * tl.exp2(high - higher)
        highest = higher
    lse = highest + tl.log2(total)
    within = (rows < asked)[:, None] & (width < WIDTH)[None, :]
    queries_at = q + batch * q_batch + head * q_head
    queries = tl.load(queries_at + rows[:, None] * q_row + width[None, :], mask=within, other=0.0)
    keys_at = k + batch * k_batch + head * k_head
    # Every tile of a head has a row of `parts` of its own.
    out = parts + (both * tl.num_programs(0) + tile) * keys
    begin = part * share
    end = tl.minimum(begin + share, keys)
    for first in range(begin, end, COLUMNS):
        at = first + columns
        inside = (width < WIDTH)[:, None] & (at < end)[None, :]
        some = tl.load(keys_at + at[None, :].to(tl.int64) * k_row + width[:, None], mask=inside, other=0.0)
        shares = tl.exp2(tl.dot(queries, some) * scale - lse[:, None])
        shares = tl.where((rows < asked)[:, None], shares, 0.0)
        tl.store(out + at, tl.sum(shares, 0), mask=at < end)
