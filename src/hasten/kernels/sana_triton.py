"""The Triton side of gated_conv.py and linear_attention.py. Imported on first use only, for Triton may be missing."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def gated_conv(  # type: ignore[no-untyped-def]
    hidden, weight, bias, out, height, width, channels,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of pixels and some channels: both halves' convolutions in registers, multiplied, written once."""
    tiles_x = tl.cdiv(width, TILE_X)
    pixel = tl.arange(0, TILE_Y * TILE_X)
    y = (tl.program_id(0) // tiles_x) * TILE_Y + pixel // TILE_X
    x = (tl.program_id(0) % tiles_x) * TILE_X + pixel % TILE_X
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    first = tl.program_id(2).to(tl.int64) * height * width
    given = hidden + first * 2 * channels
    value = tl.zeros((TILE_Y * TILE_X, CHANNELS), tl.float32)
    gate = tl.zeros((TILE_Y * TILE_X, CHANNELS), tl.float32)
    value += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + channels + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(9):
        near_y, near_x = y + (i // 3 - 1), x + (i % 3 - 1)
        inside = (near_y >= 0) & (near_y < height) & (near_x >= 0) & (near_x < width)
        at = (near_y * width + near_x)[:, None] * (2 * channels) + channel[None, :]
        mask = inside[:, None] & known[None, :]
        of_value = tl.load(weight + i * 2 * channels + channel, mask=known, other=0.0).to(tl.float32)
        of_gate = tl.load(weight + (i * 2 + 1) * channels + channel, mask=known, other=0.0).to(tl.float32)
        value += tl.load(given + at, mask=mask, other=0.0).to(tl.float32) * of_value[None, :]
        gate += tl.load(given + at + channels, mask=mask, other=0.0).to(tl.float32) * of_gate[None, :]
    result = value * gate * tl.sigmoid(gate)
    at = (y * width + x)[:, None] * channels + channel[None, :]
    mask = ((y < height) & (x < width))[:, None] & known[None, :]
    tl.store(out + first * channels + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def sum_keys(k, v, sums, tokens, heads, pieces, rows, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """One piece of one head: relu(K)^T V, (D, D), and behind it the sum of relu(K), (D), in float32."""
    head, piece = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    start = (head // heads).to(tl.int64) * tokens * heads * WIDTH + (head % heads) * WIDTH
    products = tl.zeros((WIDTH, WIDTH), tl.float32)
    ones = tl.zeros((WIDTH,), tl.float32)
    for i in range(0, rows, ROWS):
        row = piece * rows + i + tl.arange(0, ROWS)
        at = row[:, None] * (heads * WIDTH) + channel[None, :]
        mask = (row < tokens)[:, None]
        keys = tl.load(k + start + at, mask=mask, other=0.0).to(tl.float32)
        keys = tl.where(keys < 0, 0.0, keys)  # not a maximum, which would hide NaN
        values = tl.load(v + start + at, mask=mask, other=0.0).to(tl.float32)
        products += tl.dot(tl.trans(keys), values, input_precision="ieee")  # not cut to TF32; it is little work
        ones += tl.sum(keys, 0)
    at = sums + (head.to(tl.int64) * pieces + piece) * (WIDTH + 1) * WIDTH
    tl.store(at + channel[:, None] * WIDTH + channel[None, :], products)
    tl.store(at + WIDTH * WIDTH + channel, ones)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def apply_sums(q, sums, out, tokens, heads, pieces, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some rows of one head's queries through the sums of all its pieces."""
    head = tl.program_id(0)
    channel = tl.arange(0, WIDTH)
    products = tl.zeros((WIDTH, WIDTH), tl.float32)
    ones = tl.zeros((WIDTH,), tl.float32)
    for piece in range(pieces):
        at = sums + (head.to(tl.int64) * pieces + piece) * (WIDTH + 1) * WIDTH
        products += tl.load(at + channel[:, None] * WIDTH + channel[None, :])
        ones += tl.load(at + WIDTH * WIDTH + channel)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    start = (head // heads).to(tl.int64) * tokens * heads * WIDTH + (head % heads) * WIDTH
    at = row[:, None] * (heads * WIDTH) + channel[None, :]
    mask = (row < tokens)[:, None]
    queries = tl.load(q + start + at, mask=mask, other=0.0).to(tl.float32)
    queries = tl.where(queries < 0, 0.0, queries)
    attended = tl.dot(queries, products, input_precision="ieee")
    below = tl.sum(queries * ones[None, :], 1)[:, None] + 1e-15
    tl.store(out + start + at, (attended / below).to(out.dtype.element_ty), mask=mask)
