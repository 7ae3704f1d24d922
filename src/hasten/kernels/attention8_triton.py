"""The Triton kernel of attention8.py: softmax(q k^T) v over what eight.py left, all keys or chosen blocks of them.

This module imports Triton as it is loaded; attention8.py does so on first use. It knows pointers and strides; shapes,
limits and reasons are attention8.py's.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Keys that share one scale; every 8-bit tensor is padded to a multiple of it.
BLOCK = tl.constexpr(128)
# P is carried as P * 448 in e4m3, whose largest number that is; the row's sum carries the same factor and cancels it.
LOG2_448 = tl.constexpr(8.807354922057604)
# 2^x is read off the straight line between powers of two, for the exponential unit is slow:
# x + 127 with 12 bits after the point, which 1.5 * 2^11 puts at the low end of a float's bits, is, moved up by 11
# bits, that line as a float. It lies above 2^x by up to 6.1 %; less LINE_SHIFT in the exponent it lies around it, as
# near as e4m3's own rounding.
LINE_BASE = tl.constexpr(3072.0 + 127.0)
LINE_SHIFT = tl.constexpr(0.058)


@triton.jit
def _step(
    first, q, q_step, k8, k_scale, v, v_scale, biggest, total, acc, v_before, batch_head, rows, padded,
    v_base, v_row,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FP8: tl.constexpr, LINES: tl.constexpr,
    TAIL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One block of keys: scores, running softmax, P V."""
    cols = tl.arange(0, D)
    keys = first + tl.arange(0, N)
    if TMA:
        key = k8.load([(batch_head * padded + first).to(tl.int32), 0])
    else:
        key = tl.load(k8 + (batch_head * padded + keys)[:, None] * D + cols[None, :])
    score = tl.dot(q, tl.trans(key), out_dtype=tl.int32).to(tl.float32)
    step = q_step * tl.load(k_scale + batch_head * (padded // BLOCK) + first // BLOCK)
    if TAIL:
        score = tl.where((keys < rows)[None, :], score, float("-inf"))
    # step is above zero, so the largest score is the largest product.
    now = tl.maximum(biggest, tl.max(score, 1) * step)
    shrink = tl.exp2(biggest - now)
    if FP8:
        if LINES:
            line = score * step[:, None] - (now - (LOG2_448 + LINE_BASE - LINE_SHIFT))[:, None]
            weight = (tl.maximum(line, LINE_BASE - 24.0).to(tl.int32, bitcast=True) << 11).to(tl.float32, bitcast=True)
        else:
            weight = tl.exp2(score * step[:, None] - (now - LOG2_448)[:, None])
    else:
        weight = tl.exp2(score * step[:, None] - now[:, None])
    total = total * shrink + tl.sum(weight, 1)
    if FP8:
        v_now = tl.load(v_scale + batch_head * (padded // BLOCK) + first // BLOCK)
        # The accumulator is kept in units of the block's own step: one product a row instead of one an element.
        shrink *= v_before / v_now
        p = weight.to(tl.float8e4nv)
        p = tl.reshape(tl.permute(tl.reshape(p, (M, N // 16, 2, 4, 2)), (0, 1, 3, 2, 4)), (M, N))
        if TMA:
            value = v.load([(batch_head * D).to(tl.int32), first])
        else:
            value = tl.load(v + (batch_head * D + cols[:, None]) * padded + keys[None, :])
        value = tl.trans(value)
    else:
        v_now = v_before
        p = weight.to(v.dtype.element_ty)
        at = v + v_base + keys[:, None].to(tl.int64) * v_row + cols[None, :]
        value = tl.load(at, mask=(keys < rows)[:, None], other=0.0) if TAIL else tl.load(at)
    return now, total, acc * shrink[:, None] + tl.dot(p, value), v_now


@triton.jit
def attend(
    q8, q_scale, k8, k_scale, v, v_scale, v_mean, listed, count, skip_below, order, out,
    v_batch, v_head, v_row, out_batch, out_head, out_row, heads, rows, padded,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, FP8: tl.constexpr, LINES: tl.constexpr, TAIL: tl.constexpr,
    TMA: tl.constexpr, SPARSE: tl.constexpr, SKIP: tl.constexpr, STAGES: tl.constexpr,
    ORDER: tl.constexpr,
):  # fmt: skip
    """softmax(q k^T) v for M rows of one head. q_scale holds the softmax scale and log2 e.

    SPARSE: over the blocks of keys in `listed` (B H, P / 128, P / 128), `count` of them. SKIP: a block whose largest
    score lies further below the row's largest so far than skip_below (H,) in powers of two, for all M rows, is left.
    ORDER: the row at place i goes to order[i].
    """
    start = tl.program_id(0) * M
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    cols = tl.arange(0, D)
    at = start + tl.arange(0, M)
    if TMA:
        q = q8.load([(batch_head * padded + start).to(tl.int32), 0])
    else:
        q = tl.load(q8 + (batch_head * padded + at)[:, None] * D + cols[None, :], mask=(at < padded)[:, None], other=0)
    q_step = tl.load(q_scale + batch_head * padded + at, mask=at < padded, other=1.0)
    biggest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, D), tl.float32)
    v_before = 1.0
    v_base = batch * v_batch + head * v_head
    whole = rows // N * N
    if SPARSE:
        blocks = padded // BLOCK
        mine = batch_head * blocks + start // BLOCK
        for i in tl.range(0, tl.load(count + mine), num_stages=STAGES):
            first = tl.load(listed + mine * blocks + i) * BLOCK
            if SKIP:
                key = tl.load(k8 + (batch_head * padded + first + tl.arange(0, N))[:, None] * D + cols[None, :])
                score = tl.dot(q, tl.trans(key), out_dtype=tl.int32).to(tl.float32)
                step = q_step * tl.load(k_scale + batch_head * blocks + first // BLOCK)
                if tl.max(tl.max(score, 1) * step - biggest) + tl.load(skip_below + head) > 0.0:
                    biggest, total, acc, v_before = _step(
                        first, q, q_step, k8, k_scale, v, v_scale, biggest, total, acc, v_before, batch_head, rows,
                        padded, v_base, v_row, D, M, N, FP8, LINES, TAIL, TMA,
                    )  # fmt: skip
            else:
                biggest, total, acc, v_before = _step(
                    first, q, q_step, k8, k_scale, v, v_scale, biggest, total, acc, v_before, batch_head, rows, padded,
                    v_base, v_row, D, M, N, FP8, LINES, TAIL, TMA,
                )  # fmt: skip
    else:
        for first in tl.range(0, whole, N, num_stages=STAGES):
            biggest, total, acc, v_before = _step(
                first, q, q_step, k8, k_scale, v, v_scale, biggest, total, acc, v_before, batch_head, rows, padded,
                v_base, v_row, D, M, N, FP8, LINES, False, TMA,
            )  # fmt: skip
        if TAIL:
            biggest, total, acc, v_before = _step(
                whole, q, q_step, k8, k_scale, v, v_scale, biggest, total, acc, v_before, batch_head, rows, padded,
                v_base, v_row, D, M, N, FP8, LINES, True, TMA,
            )  # fmt: skip
    acc *= (v_before / total)[:, None]
    if FP8:
        acc += tl.load(v_mean + batch_head * D + cols)[None, :]
    to = tl.load(order + at, mask=at < rows, other=0) if ORDER else at
    place = out + batch * out_batch + head * out_head + to[:, None].to(tl.int64) * out_row + cols[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(at < rows)[:, None])
