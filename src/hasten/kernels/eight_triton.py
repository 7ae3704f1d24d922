"""The Triton kernels of eight.py: one pass that turns q, k, v into 8 bits, with norm and rotation on its way.

This module imports Triton as it is loaded; eight.py does so on first use. It knows pointers and strides; shapes,
limits and reasons are eight.py's.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Keys that share one scale; every 8-bit tensor is padded to a multiple of it.
BLOCK = tl.constexpr(128)
# Keys' mean is that of 128 from all over the sequence, values' that of 8 times as many: what is left of it adds up
# over all keys, in tensor cores that keep some 13 bits of a sum.
PARTS = tl.constexpr(8)


@triton.jit
def _rows(
    x, text, weight, text_weight, cos, sin, rows, inside, cols, row_stride, text_row_stride, cos_stride, cos_pair,
    text_rows, eps,
    D: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, TEXT: tl.constexpr,
):  # fmt: skip
    """Rows of q or k in float32, (R, D): normed and rotated where that is asked for; zero outside."""
    place = x + (rows - text_rows)[:, None].to(tl.int64) * row_stride + cols[None, :]
    if TEXT:
        of_text = rows < text_rows
        place = tl.where(of_text[:, None], text + rows[:, None].to(tl.int64) * text_row_stride + cols[None, :], place)
    value = tl.load(place, mask=inside[:, None], other=0.0).to(tl.float32)
    if NORM:
        value *= tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
        gain = tl.load(weight + cols).to(tl.float32)[None, :]
        if TEXT:
            gain = tl.where(of_text[:, None], tl.load(text_weight + cols).to(tl.float32)[None, :], gain)
        value *= gain
    if ROPE:
        pairs = tl.arange(0, D // 2)
        at = rows[:, None].to(tl.int64) * cos_stride + pairs[None, :] * cos_pair
        c = tl.load(cos + at, mask=inside[:, None], other=0.0).to(tl.float32)
        s = tl.load(sin + at, mask=inside[:, None], other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(value, (R, D // 2, 2)))
        value = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (R, D))
    return value


@triton.jit
def _rounded(x):
    """int8, halves to even: 1.5 * 2^23 more puts the whole number at the low end of a float's bits."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _means(value, inside, mean, alike, at, cols, D: tl.constexpr):
    """A block's mean row, and the mean cosine between any two of its rows: the squared length of its mean unit row."""
    count = tl.sum(inside.to(tl.float32), 0)
    tl.store(mean + at * D + cols, tl.sum(value, 0) / count)
    unit = value * tl.rsqrt(tl.maximum(tl.sum(value * value, 1), 1e-24))[:, None]
    unit = tl.sum(unit, 0) / count
    tl.store(alike + at, tl.sum(unit * unit, 0))


@triton.jit
def centres(
    k, text_k, v, text_v, k_weight, text_k_weight, cos, sin, mean, k_batch, k_head, k_row, tk_batch, tk_head,
    tk_row, v_batch, v_head, v_row, tv_batch, tv_head, tv_row, cos_stride, cos_pair, heads, rows, text_rows, eps,
    D: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, TEXT: tl.constexpr,
):  # fmt: skip
    """What is taken off every key of a head (axis 1 is 0) and off every value (the mean of all others).

    Softmax does not see a constant on the keys; one on the values is what comes out besides. mean: (B H, 1 + PARTS, D).
    """
    batch_head = tl.program_id(0).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    cols = tl.arange(0, D)
    here = tl.arange(0, BLOCK).to(tl.int64)
    if tl.program_id(1) == 0:
        some = (here * rows // BLOCK).to(tl.int32)
        value = _rows(
            k + batch * k_batch + head * k_head, text_k + batch * tk_batch + head * tk_head, k_weight, text_k_weight,
            cos, sin, some, some < rows, cols, k_row, tk_row, cos_stride, cos_pair, text_rows, eps, D, BLOCK, NORM,
            ROPE, TEXT,
        )  # fmt: skip
    else:
        some = ((here * PARTS + tl.program_id(1) - 1) * rows // (BLOCK * PARTS)).to(tl.int32)
        value = _rows(
            v + batch * v_batch + head * v_head, text_v + batch * tv_batch + head * tv_head, k_weight, k_weight,
            cos, sin, some, some < rows, cols, v_row, tv_row, 0, 0, text_rows, eps, D, BLOCK, False, False, TEXT,
        )  # fmt: skip
    tl.store(mean + (batch_head * (1 + PARTS) + tl.program_id(1)) * D + cols, tl.sum(value, 0) / BLOCK)


@triton.jit
def prepare(
    q, k, v, text_q, text_k, text_v, q_weight, k_weight, text_q_weight, text_k_weight, cos, sin,
    order, mean, v_mean, q8, q_scale, k8, k_scale, v8, v_scale, q_mean, q_alike, k_mean, k_alike,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    tq_batch, tq_head, tq_row, tk_batch, tk_head, tk_row, tv_batch, tv_head, tv_row,
    cos_stride, cos_pair, heads, rows, padded, text_rows, scale, eps,
    D: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, TEXT: tl.constexpr, FP8: tl.constexpr,
    SPARSE: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """One block of 128 rows of one head of q (axis 2 is 0), k (1) or v (2), in 8 bits with its scales.

    ORDER: place i holds the row order[i] (rows,) int32.
    """
    block = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)
    which = tl.program_id(2)
    batch, head = batch_head // heads, batch_head % heads
    cols = tl.arange(0, D)
    here = tl.arange(0, BLOCK)
    at = block * BLOCK + here
    inside = at < rows
    source = tl.load(order + at, mask=inside, other=0) if ORDER else at
    if which == 0:
        value = _rows(
            q + batch * q_batch + head * q_head, text_q + batch * tq_batch + head * tq_head, q_weight, text_q_weight,
            cos, sin, source, inside, cols, q_row, tq_row, cos_stride, cos_pair, text_rows, eps, D, BLOCK, NORM, ROPE,
            TEXT,
        )  # fmt: skip
        if SPARSE:
            _means(value, inside, q_mean, q_alike, batch_head * (padded // BLOCK) + block, cols, D)
        q_step = tl.maximum(tl.max(tl.abs(value), 1), 1e-12) / 127.0
        tl.store(
            q8 + (batch_head * padded + at)[:, None] * D + cols[None, :], _rounded(value * (1.0 / q_step)[:, None])
        )
        tl.store(q_scale + batch_head * padded + at, q_step * scale)
    elif which == 1:
        key = k + batch * k_batch + head * k_head
        text_key = text_k + batch * tk_batch + head * tk_head
        value = _rows(
            key, text_key, k_weight, text_k_weight, cos, sin, source, inside, cols, k_row, tk_row, cos_stride, cos_pair,
            text_rows, eps, D, BLOCK, NORM, ROPE, TEXT,
        )  # fmt: skip
        centre = tl.load(mean + batch_head * (1 + PARTS) * D + cols)
        value = tl.where(inside[:, None], value - centre[None, :], 0.0)
        if SPARSE:
            _means(value, inside, k_mean, k_alike, batch_head * (padded // BLOCK) + block, cols, D)
        k_step = tl.maximum(tl.max(tl.abs(value)), 1e-12) / 127.0
        tl.store(k8 + (batch_head * padded + at)[:, None] * D + cols[None, :], _rounded(value * (1.0 / k_step)))
        tl.store(k_scale + batch_head * (padded // BLOCK) + block, k_step)
    elif FP8:
        # Within 16 keys in the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15: so the accumulators of Q K^T are, thread
        # for thread, what the tensor cores want as the left side of P V.
        shuffled = here // 16 * 16 + here % 4 // 2 * 8 + here % 16 // 4 * 2 + here % 2
        at_v = block * BLOCK + shuffled
        inside_v = at_v < rows
        source_v = tl.load(order + at_v, mask=inside_v, other=0) if ORDER else at_v
        of_v, of_text = v + batch * v_batch + head * v_head, text_v + batch * tv_batch + head * tv_head
        value = _rows(
            of_v, of_text, q_weight, q_weight, cos, sin, source_v, inside_v, cols, v_row, tv_row, 0, 0, text_rows, eps,
            D, BLOCK, False, False, TEXT,
        )  # fmt: skip
        parts = mean + (batch_head * (1 + PARTS) + 1 + tl.arange(0, PARTS))[:, None] * D + cols[None, :]
        centre = tl.sum(tl.load(parts), 0) / PARTS
        tl.store(v_mean + batch_head * D + cols, centre, mask=cols < D * (block == 0).to(tl.int32))
        value = tl.where(inside_v[:, None], value - centre[None, :], 0.0)
        v_step = tl.maximum(tl.max(tl.abs(value)), 1e-6) / 448.0
        turned = tl.trans((value * (1.0 / v_step)).to(tl.float8e4nv))
        tl.store(v8 + (batch_head * D + cols[:, None]) * padded + (block * BLOCK + here)[None, :], turned)
        tl.store(v_scale + batch_head * (padded // BLOCK) + block, v_step)
