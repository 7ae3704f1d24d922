"""The Triton kernels of eight.py: one pass that turns q, k, v into 8 bits, with norm and rotation on its way.

This module imports Triton as it is loaded; eight.py does so on first use. It knows pointers and strides; shapes,
limits and reasons are eight.py's.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Keys that share one scale; every 8-bit tensor is padded to a multiple of it.
BLOCK = tl.constexpr(128)
# Keys' mean is that of SOME from all over the sequence: what is left of an outlying channel's constant is a fraction of
# its noise. Values' is that of MORE: what is left of it adds up over all keys, in tensor cores that keep some 13 bits
# of a sum. A program takes only QUARTER of the channels, so that it can ask for all of its rows at once.
SOME = tl.constexpr(32)
MORE = tl.constexpr(1024)
QUARTER = tl.constexpr(4)


@triton.jit
def _rows(
    x, text, weight, text_weight, start, rows, inside, cols, row_stride, text_row_stride, text_rows, eps,
    D: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, TEXT: tl.constexpr,
):  # fmt: skip
    """Rows of q, k or v, (R, D), and what each is still to be multiplied by, (R,), both float32; zero outside.

    NORM: times their weights. TEXT: 0 where there is none, 1 where row `start` says it for all of them, or 2.
    """
    x -= tl.cast(text_rows, tl.int64) * row_stride
    if TEXT == 1:
        of_text = start < text_rows
        x = tl.where(of_text, text, x)
        weight = tl.where(of_text, text_weight, weight)
        row_stride = tl.where(of_text, text_row_stride, row_stride)
    place = x + rows.to(tl.int64) * row_stride
    if TEXT == 2:
        of_text = rows < text_rows
        place = tl.where(of_text, text + rows.to(tl.int64) * text_row_stride, place)
    value = tl.load(place[:, None] + cols[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    factor = tl.full((R,), 1.0, tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
        gain = tl.load(weight + cols).to(tl.float32)[None, :]
        if TEXT == 2:
            gain = tl.where(of_text[:, None], tl.load(text_weight + cols).to(tl.float32)[None, :], gain)
        value *= gain
    return value, factor


@triton.jit
def _turned(value, c, s, D: tl.constexpr, R: tl.constexpr):
    """Neighbouring channels of (R, D) turned by their angle, whose cosine and sine are (R, D / 2)."""
    c, s = c.to(tl.float32), s.to(tl.float32)
    even, odd = tl.split(tl.reshape(value, (R, D // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (R, D))


@triton.jit
def _turns(turns, rows, padded, D: tl.constexpr):
    """Cosines and sines of rows from the table that `first` made."""
    at = rows[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
    return tl.load(turns + at), tl.load(turns + padded * (D // 2) + at)


@triton.jit
def _cos_sin(cos, sin, rows, inside, cos_stride, cos_pair, D: tl.constexpr):
    at = rows[:, None].to(tl.int64) * cos_stride + tl.arange(0, D // 2)[None, :] * cos_pair
    c = tl.load(cos + at, mask=inside[:, None], other=0.0)
    return c, tl.load(sin + at, mask=inside[:, None], other=0.0)


@triton.jit
def _rounded(x):
    """int8, halves to even: 1.5 * 2^23 more puts the whole number at the low end of a float's bits."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _larger(a, b, c, d):
    """The larger of a and c, and of b and d: two searches in one."""
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _means(value, squares, inside, mean, alike, at, cols, D: tl.constexpr, ALIKE: tl.constexpr):
    """A block's mean row, and (ALIKE) the mean cosine between any two of its rows, its mean unit row's squared length.

    squares (R,): the rows' lengths, squared.
    """
    count = tl.sum(inside.to(tl.float32), 0)
    tl.store(mean + at * D + cols, tl.sum(value, 0) / count)
    if ALIKE:
        unit = value * tl.rsqrt(tl.maximum(squares, 1e-24))[:, None]
        unit = tl.sum(unit, 0) / count
        tl.store(alike + at, tl.sum(unit * unit, 0))


@triton.jit
def first(
    k, text_k, v, text_v, k_weight, text_k_weight, cos, sin, mean, v_mean, turns, k_batch, k_head, k_row, tk_batch,
    tk_head, tk_row, v_batch, v_head, v_row, tv_batch, tv_head, tv_row, cos_stride, cos_pair, heads, both, constants,
    rows, padded, text_rows, eps, D: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, TEXT: tl.constexpr,
):  # fmt: skip
    """What `prepare` needs of the whole: the constants, by the first `constants` programs, and the turns.

    A constant is taken off every key of a head and (from program `both` on) off every value, a mean of rows from all
    over it. Softmax does not see one on the keys; one on the values is what comes out besides.
    The turns are cosines and sines in float16, (2, padded, D / 2), 128 rows a program. Every head reads them anew: in
    float32, each twice, they would be four times the bytes of q and k; 2^-12 off is nothing beside int8's steps.
    """
    program = tl.program_id(0)
    batch, head = (program % both // heads).to(tl.int64), (program % both % heads).to(tl.int64)
    cols = tl.arange(0, D)
    if program < both:
        at = (tl.arange(0, SOME).to(tl.int64) * rows // SOME).to(tl.int32)
        value, factor = _rows(
            k + batch * k_batch + head * k_head, text_k + batch * tk_batch + head * tk_head, k_weight, text_k_weight, 0,
            at, at < rows, cols, k_row, tk_row, text_rows, eps, D, SOME, NORM, TEXT,
        )  # fmt: skip
        if ROPE:
            c, s = _cos_sin(cos, sin, at, at < rows, cos_stride, cos_pair, D)
            value = _turned(value, c, s, D, SOME)
        tl.store(mean + program * D + cols, tl.sum(value * factor[:, None], 0) / SOME)
    elif program < constants:
        there = (tl.arange(0, MORE).to(tl.int64) * rows // MORE).to(tl.int32)
        some = (program // both - 1) * (D // QUARTER) + tl.arange(0, D // QUARTER)
        found, _ = _rows(
            v + batch * v_batch + head * v_head, text_v + batch * tv_batch + head * tv_head, k_weight, k_weight, 0,
            there, there < rows, some, v_row, tv_row, text_rows, eps, D // QUARTER, MORE, False, TEXT,
        )  # fmt: skip
        tl.store(v_mean + program % both * D + some, tl.sum(found, 0) / MORE)
    elif ROPE:
        row = (program - constants) * BLOCK + tl.arange(0, BLOCK)
        c_row, s_row = _cos_sin(cos, sin, row, row < rows, cos_stride, cos_pair, D)
        to = row[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
        tl.store(turns + to, c_row.to(tl.float16))
        tl.store(turns + padded * (D // 2) + to, s_row.to(tl.float16))


@triton.jit
def prepare(
    q, k, v, text_q, text_k, text_v, q_weight, k_weight, text_q_weight, text_k_weight, turns,
    order, mean, v_mean, q8, q_scale, k8, k_scale, v8, v_scale, q_length, k_length, q_mean, q_alike, k_mean, k_alike,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    tq_batch, tq_head, tq_row, tk_batch, tk_head, tk_row, tv_batch, tv_head, tv_row,
    heads, rows, padded, text_rows, scale, eps,
    D: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, TEXT: tl.constexpr, FP8: tl.constexpr,
    SPARSE: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """One block of 128 rows of one head of q, k or v, in 8 bits with its scales.

    Heads lie side by side in memory, so they come first: blocks that run at once read whole rows.
    Rows of q take their norm's factor as they become whole numbers, so rotation does not wait for the norm.
    SPARSE: 1 for blocks' mean rows, 2 for how alike their rows are as well.
    ORDER: place i holds the row order[i] (rows,) int32.
    """
    head = tl.program_id(0).to(tl.int64)
    KINDS: tl.constexpr = 3 if FP8 else 2
    which = tl.program_id(1) % KINDS
    batch = (tl.program_id(1) // KINDS).to(tl.int64)
    block = tl.program_id(2)
    batch_head = batch * heads + head
    cols = tl.arange(0, D)
    here = tl.arange(0, BLOCK)
    start = block * BLOCK
    at = start + here
    inside = at < rows
    source = tl.load(order + at, mask=inside, other=0) if ORDER else at
    out = (batch_head * padded + start) * D + here[:, None] * D + cols[None, :]
    if which == 0:
        value, factor = _rows(
            q + batch * q_batch + head * q_head, text_q + batch * tq_batch + head * tq_head, q_weight, text_q_weight,
            start, source, inside, cols, q_row, tq_row, text_rows, eps, D, BLOCK, NORM, TEXT,
        )  # fmt: skip
        if ROPE:
            c, s = _turns(turns, source, padded, D)
            value = _turned(value, c, s, D, BLOCK)
        squares = tl.sum(value * value, 1) * factor * factor
        if SPARSE > 0:
            place = batch_head * (padded // BLOCK) + block
            _means(value * factor[:, None], squares, inside, q_mean, q_alike, place, cols, D, SPARSE == 2)
        q_step = tl.maximum(tl.max(tl.abs(value), 1) * factor, 1e-12) / 127.0
        tl.store(q8 + out, _rounded(value * (factor / q_step)[:, None]))
        tl.store(q_scale + batch_head * padded + at, q_step * scale)
        if FP8:
            tl.store(q_length + batch_head * padded + at, tl.sqrt(squares) * scale)
    elif which == 1:
        value, factor = _rows(
            k + batch * k_batch + head * k_head, text_k + batch * tk_batch + head * tk_head, k_weight, text_k_weight,
            start, source, inside, cols, k_row, tk_row, text_rows, eps, D, BLOCK, NORM, TEXT,
        )  # fmt: skip
        if ROPE:
            c, s = _turns(turns, source, padded, D)
            value = _turned(value, c, s, D, BLOCK)
        centre = tl.load(mean + batch_head * D + cols)
        value = value * factor[:, None] - centre[None, :] * inside.to(tl.float32)[:, None]
        squares = tl.sum(value * value, 1)
        if SPARSE > 0:
            place = batch_head * (padded // BLOCK) + block
            _means(value, squares, inside, k_mean, k_alike, place, cols, D, SPARSE == 2)
        k_most = tl.max(tl.abs(value), 1)
        if FP8:
            k_most, longest = tl.reduce((k_most, squares), 0, _larger)
            tl.store(k_length + batch_head * (padded // BLOCK) + block, tl.sqrt(longest))
        else:
            k_most = tl.max(k_most, 0)
        k_step = tl.maximum(k_most, 1e-12) / 127.0
        tl.store(k8 + out, _rounded(value * (1.0 / k_step)))
        tl.store(k_scale + batch_head * (padded // BLOCK) + block, k_step)
    elif FP8:
        # Within 16 keys in the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15: so the accumulators of Q K^T are, thread
        # for thread, what the tensor cores want as the left side of P V.
        shuffled = here // 16 * 16 + here % 4 // 2 * 8 + here % 16 // 4 * 2 + here % 2
        at_v = start + shuffled
        inside_v = at_v < rows
        source_v = tl.load(order + at_v, mask=inside_v, other=0) if ORDER else at_v
        value, _ = _rows(
            v + batch * v_batch + head * v_head, text_v + batch * tv_batch + head * tv_head, q_weight, q_weight,
            start, source_v, inside_v, cols, v_row, tv_row, text_rows, eps, D, BLOCK, False, TEXT,
        )  # fmt: skip
        centre = tl.load(v_mean + batch_head * D + cols)
        value -= centre[None, :] * inside_v.to(tl.float32)[:, None]
        v_step = tl.maximum(tl.max(tl.abs(value)), 1e-6) / 448.0
        turned = tl.trans((value * (1.0 / v_step)).to(tl.float8e4nv))
        tl.store(v8 + batch_head * D * padded + start + cols[:, None] * padded + here[None, :], turned)
        tl.store(v_scale + batch_head * (padded // BLOCK) + block, v_step)
