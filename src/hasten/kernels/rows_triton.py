"""The Triton side of rows.py: one program for one or a few rows, everything in float32 in between.

Imported on first use only, for Triton may be missing. A row is read once and written once; what is computed with it
(norm, modulation, largest value, cast) stays in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)  # the largest e4m3 number
INT8_MAX = tl.constexpr(127.0)
SMALLEST = tl.constexpr(1e-12)  # keeps the scale of an all-zero row away from zero


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store_row(out, row_scales, row, values, column, inside, width, QUANTISES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes one row as it is, or divided by its own scale; NaN and infinity stay visible as NaN."""
    if QUANTISES:
        largest = tl.max(tl.abs(values), 0)
        if out.dtype.element_ty == tl.int8:
            scale = tl.maximum(largest, SMALLEST) / INT8_MAX
            # Half to even is not at hand in Triton; half up differs on exact halves alone.
            whole = tl.floor(values / scale + 0.5)
            # An int8 cannot say NaN: the scale says it.
            broken = tl.sum(tl.where(values != values, 1.0, 0.0), 0) > 0.0
            scale = tl.where(broken, float("nan"), scale)
            tl.store(out + row * width + column, whole.to(tl.int8), mask=inside)
        else:
            scale = tl.maximum(largest, SMALLEST) / FP8_MAX
            values *= 1.0 / scale  # one division a row: the units that divide are what a wide row waits for
            tl.store(out + row * width + column, values.to(out.dtype.element_ty), mask=inside)
        tl.store(row_scales + row, scale)
    else:
        tl.store(out + row * width + column, values.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _broken(value):  # type: ignore[no-untyped-def]
    return tl.sum(tl.where(value != value, 1.0, 0.0), 0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store_part(out, first, WIDTH: tl.constexpr, value, factor, BLOCK: tl.constexpr, QUANTISES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some columns of a row, in 8 bits times the inverse of the row's scale."""
    column = first + tl.arange(0, BLOCK)
    if QUANTISES:
        value *= factor
        if out.dtype.element_ty == tl.int8:
            value = tl.floor(value + 0.5)
    tl.store(out + column, value.to(out.dtype.element_ty), mask=column < WIDTH)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _scale(largest, broken, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row's scale and its inverse. An int8 cannot say NaN: the scale says it."""
    if dtype == tl.int8:
        scale = tl.maximum(largest, SMALLEST) / INT8_MAX
        return tl.where(broken > 0.0, float("nan"), scale), 1.0 / scale
    scale = tl.maximum(largest, SMALLEST) / FP8_MAX
    return scale, 1.0 / scale


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _summed(  # type: ignore[no-untyped-def]
    source, update, mods, target, first,
    WIDTH: tl.constexpr, GATE: tl.constexpr, UPDATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some columns of x, or of x + gate * update, which is written then; zero beyond the row."""
    column = first + tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    if UPDATES:
        y = tl.load(update + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(mods + GATE * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        kept = (x + gate * y).to(target.dtype.element_ty)
        tl.store(target + column, kept, mask=inside)
        x = kept.to(tl.float32)
    return x


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _squares(x, mean, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    centred = tl.where(first + tl.arange(0, BLOCK) < WIDTH, x - mean, 0.0)
    return centred * centred


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _modulated(  # type: ignore[no-untyped-def]
    x, mean, steep, mods, first, WIDTH: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    column = first + tl.arange(0, BLOCK)
    inside = column < WIDTH
    shift = tl.load(mods + SHIFT * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(mods + SCALE * WIDTH + column, mask=inside, other=0.0).to(tl.float32) + 1.0
    return tl.where(inside, (x - mean) * steep * scale + shift, 0.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def residual_norm(  # type: ignore[no-untyped-def]
    text, image, update, text_mods, image_mods, text_out, image_out, normed, row_scales,
    length, tokens, batch,
    text_batch, text_row, image_batch, image_row, update_row, text_mods_batch, image_mods_batch,
    text_out_batch, image_out_batch, eps,
    WIDTH: tl.constexpr, GATE: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr,
    UPDATES: tl.constexpr, NORMS: tl.constexpr, QUANTISES: tl.constexpr, JOINT: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x + gate * update, then LayerNorm, * (1 + scale) + shift, the row's scale and the cast; each part optional.

    A row lies in 1 or 3 parts of BLOCK columns. Programs take rows in turns, text's first."""
    b = tl.program_id(1).to(tl.int64)
    text += b * text_batch
    image += b * image_batch
    text_out += b * text_out_batch
    image_out += b * image_out_batch
    text_mods += b * text_mods_batch
    image_mods += b * image_mods_batch
    COUNTS: tl.constexpr = QUANTISES and normed.dtype.element_ty == tl.int8
    for turn in tl.range(tl.program_id(0), length + tokens, tl.num_programs(0), num_stages=STAGES):
        place = tl.full((), turn, tl.int64)  # an int in the interpreter
        is_text = place < length
        row = tl.where(is_text, place, place - length)
        source = tl.where(is_text, text + row * text_row, image + row * image_row)
        target = tl.where(is_text, text_out + row * WIDTH, image_out + row * WIDTH)
        mods = tl.where(is_text, text_mods, image_mods)
        if JOINT:  # rows of one sequence, image behind text, batch after batch
            at = b * (length + tokens) + place
        else:  # all text rows, then all image rows
            at = tl.where(is_text, b * length, batch * length + b * tokens) + row
        more = update + at * update_row
        x0 = _summed(source, more, mods, target, 0, WIDTH, GATE, UPDATES, BLOCK)
        if PARTS == 3:
            x1 = _summed(source, more, mods, target, BLOCK, WIDTH, GATE, UPDATES, BLOCK)
            x2 = _summed(source, more, mods, target, 2 * BLOCK, WIDTH, GATE, UPDATES, BLOCK)
        if NORMS:
            if PARTS == 3:  # column by column first: one sum over all threads
                mean = tl.sum(x0 + x1 + x2, 0) / WIDTH
                squares = _squares(x0, mean, 0, WIDTH, BLOCK) + _squares(x1, mean, BLOCK, WIDTH, BLOCK)
                squares += _squares(x2, mean, 2 * BLOCK, WIDTH, BLOCK)
            else:
                mean = tl.sum(x0, 0) / WIDTH
                squares = _squares(x0, mean, 0, WIDTH, BLOCK)
            steep = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
            x0 = _modulated(x0, mean, steep, mods, 0, WIDTH, SHIFT, SCALE, BLOCK)
            if PARTS == 3:
                x1 = _modulated(x1, mean, steep, mods, BLOCK, WIDTH, SHIFT, SCALE, BLOCK)
                x2 = _modulated(x2, mean, steep, mods, 2 * BLOCK, WIDTH, SHIFT, SCALE, BLOCK)
            factor = 1.0
            if QUANTISES:
                sizes = tl.abs(x0)
                broken = _broken(x0) if COUNTS else 0.0
                if PARTS == 3:
                    sizes = tl.maximum(tl.maximum(sizes, tl.abs(x1)), tl.abs(x2))
                    broken += (_broken(x1) + _broken(x2)) if COUNTS else 0.0
                scale, factor = _scale(tl.max(sizes, 0), broken, normed.dtype.element_ty)
                tl.store(row_scales + at, scale)
            out = normed + at * WIDTH
            _store_part(out, 0, WIDTH, x0, factor, BLOCK, QUANTISES)
            if PARTS == 3:
                _store_part(out, BLOCK, WIDTH, x1, factor, BLOCK, QUANTISES)
                _store_part(out, 2 * BLOCK, WIDTH, x2, factor, BLOCK, QUANTISES)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gelu(x, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """gelu's tanh form as x * sigmoid(2u). Source: Hendrycks and Gimpel, 2016.

    FAST: x / 2 * (1 + tanh(u)) by the GPU's own tanh, a fifth of the instructions' time: off by at most |x| / 4096, for
    that tanh is within 2^-11 (PTX ISA); float8's own steps are 2^-4 of a number. Minus infinity gives NaN there.
    """
    if FAST:
        turned = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x * (0.7978845608028654 + 0.0356774081 * (x * x))],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        half = 0.5 * x
        return half + half * turned
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(tl.minimum(-2.0 * u, 80.0)))  # no infinity: x / e**80 is zero enough


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _loaded_gelu(hidden, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    column = first + tl.arange(0, BLOCK)
    return _gelu(tl.load(hidden + column, mask=column < WIDTH, other=0.0).to(tl.float32), FAST)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def gelu_row(  # type: ignore[no-untyped-def]
    before, hidden, out, row_scales, count, before_row, hidden_row, BEFORE_WIDTH: tl.constexpr, WIDTH: tl.constexpr,
    BEFORE: tl.constexpr, QUANTISES: tl.constexpr, BLOCK_BEFORE: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr, FAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of [before, gelu(hidden)], each with one scale for all of it. hidden lies in 1 to 4 parts of BLOCK columns:
    12288 in one block of a power of two would leave a quarter of the threads without work. Programs take rows in turns;
    with 2 STAGES the next row is on its way while one is worked on."""
    COUNTS: tl.constexpr = QUANTISES and out.dtype.element_ty == tl.int8
    for turn in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=STAGES):
        row = tl.full((), turn, tl.int64)  # an int in the interpreter
        source = hidden + row * hidden_row
        target = out + row * (BEFORE_WIDTH + WIDTH)
        value0 = _loaded_gelu(source, 0, WIDTH, BLOCK, FAST)
        sizes = tl.abs(value0)
        broken = _broken(value0) if COUNTS else 0.0
        if PARTS > 1:
            value1 = _loaded_gelu(source, BLOCK, WIDTH, BLOCK, FAST)
            sizes = tl.maximum(sizes, tl.abs(value1))
            broken += _broken(value1) if COUNTS else 0.0
        if PARTS > 2:
            value2 = _loaded_gelu(source, 2 * BLOCK, WIDTH, BLOCK, FAST)
            sizes = tl.maximum(sizes, tl.abs(value2))
            broken += _broken(value2) if COUNTS else 0.0
        if PARTS > 3:
            value3 = _loaded_gelu(source, 3 * BLOCK, WIDTH, BLOCK, FAST)
            sizes = tl.maximum(sizes, tl.abs(value3))
            broken += _broken(value3) if COUNTS else 0.0
        largest = tl.max(sizes, 0)
        if BEFORE:
            at = tl.arange(0, BLOCK_BEFORE)
            head = tl.load(before + row * before_row + at, mask=at < BEFORE_WIDTH, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(head), 0))
            broken += _broken(head) if COUNTS else 0.0
        factor = 1.0
        if QUANTISES:
            scale, factor = _scale(largest, broken, out.dtype.element_ty)
            tl.store(row_scales + row, scale)
        if BEFORE:
            _store_part(target, 0, BEFORE_WIDTH, head, factor, BLOCK_BEFORE, QUANTISES)
            target += BEFORE_WIDTH
        _store_part(target, 0, WIDTH, value0, factor, BLOCK, QUANTISES)
        if PARTS > 1:
            _store_part(target, BLOCK, WIDTH, value1, factor, BLOCK, QUANTISES)
        if PARTS > 2:
            _store_part(target, 2 * BLOCK, WIDTH, value2, factor, BLOCK, QUANTISES)
        if PARTS > 3:
            _store_part(target, 3 * BLOCK, WIDTH, value3, factor, BLOCK, QUANTISES)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def split_row(  # type: ignore[no-untyped-def]
    x, out, row_scales, length, tokens, batch, width, x_batch, x_row, QUANTISES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row of a joint sequence to its place among all text rows, then all image rows."""
    position = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    row = tl.where(position < length, b * length + position, batch * length + b * tokens + position - length)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + b * x_batch + position.to(tl.int64) * x_row + column, mask=inside, other=0.0).to(tl.float32)
    _store_row(out, row_scales, row, values, column, inside, width, QUANTISES)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def norm_rope(  # type: ignore[no-untyped-def]
    qkv, text_q, text_k, image_q, image_k, cos, sin, q, k,
    length, tokens, batch, heads, qkv_row, cos_row, cos_pair, sin_row, sin_pair, eps,
    JOINT: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token's queries or keys: RMSNorm over each head, rotation of neighbouring pairs, joint order."""
    position = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    is_text = position < length
    total = length + tokens
    if JOINT:
        row = b * total + position
    else:
        row = tl.where(is_text, b * length + position, batch * length + b * tokens + position - length)
    head = tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, 2 * HALF)[None, :]
    inside = head < heads
    at = head * (2 * HALF) + channel
    inner = heads * (2 * HALF)
    given = tl.load(qkv + row * qkv_row + part * inner + at, mask=inside, other=0.0)
    x = given.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 1) / (2 * HALF) + eps)[:, None]
    weight = tl.where(part == 0, tl.where(is_text, text_q, image_q), tl.where(is_text, text_k, image_k))
    x *= tl.load(weight + channel).to(tl.float32)
    pair = tl.arange(0, HALF)
    c = tl.load(cos + position * cos_row + pair * cos_pair).to(tl.float32)[None, :]
    s = tl.load(sin + position * sin_row + pair * sin_pair).to(tl.float32)[None, :]
    even, odd = tl.split(tl.reshape(x, (HEADS, HALF, 2)))
    turned = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (HEADS, 2 * HALF))
    out = tl.where(part == 0, q, k)
    tl.store(out + (b * total + position) * inner + at, turned.to(q.dtype.element_ty), mask=inside)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs a kernel over `grid`, on the device that its first tensor lies on."""
    at = args[0].device
    if at.type != "cuda" or at.index == torch.cuda.current_device():
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(at):  # Triton launches on the current device
        kernel[grid](*args, **options)
