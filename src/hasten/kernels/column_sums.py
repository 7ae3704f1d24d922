"""The Triton kernel behind attention_received. Importing this module needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def column_sums(  # type: ignore[no-untyped-def]
    q, k, parts, asked, keys, tiles, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    width = tl.arange(0, PADDED)
    columns = tl.arange(0, COLUMNS)
    within = (rows < asked)[:, None] & (width < WIDTH)[None, :]
    queries = tl.load(q + head * asked * WIDTH + rows[:, None] * WIDTH + width[None, :], mask=within, other=0.0)
    keys_at = k + head * keys * WIDTH
    # First pass: each row's log-sum-exp, in base 2.
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, keys, COLUMNS):
        at = first + columns
        inside = (width < WIDTH)[:, None] & (at < keys)[None, :]
        some = tl.load(keys_at + at[None, :] * WIDTH + width[:, None], mask=inside, other=0.0)
        scores = tl.dot(queries, some) * scale
        scores = tl.where((at < keys)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        highest = higher
    lse = highest + tl.log2(total)
    # Second pass: what each key receives from this tile's rows. Every program has a row of `parts` of its own.
    out = parts + (head * tiles + tile) * keys
    for first in range(0, keys, COLUMNS):
        at = first + columns
        inside = (width < WIDTH)[:, None] & (at < keys)[None, :]
        some = tl.load(keys_at + at[None, :] * WIDTH + width[:, None], mask=inside, other=0.0)
        shares = tl.exp2(tl.dot(queries, some) * scale - lse[:, None])
        shares = tl.where((rows < asked)[:, None], shares, 0.0)
        tl.store(out + at, tl.sum(shares, 0), mask=at < keys)
