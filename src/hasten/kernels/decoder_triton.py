"""The Triton side of decoder.py. Imported on first use only, for Triton may be missing."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def norm_add(  # type: ignore[no-untyped-def]
    pixels, weight, bias, residual, out, count, width, eps,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some rows, whole: their mean square, then the norm and what is added, written once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    known = channel < width
    mask = (row < count)[:, None] & known[None, :]
    at = row[:, None] * width + channel[None, :]
    values = tl.load(pixels + at, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 1) / width + eps)
    of_weight = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    of_bias = tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    values = values * scale[:, None] * of_weight[None, :] + of_bias[None, :]
    if RESIDUAL:
        values += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def spread(  # type: ignore[no-untyped-def]
    pixels, update, out, height, width, channels, given,
    REPEATS: tl.constexpr, UPDATE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A piece of one row of the large picture and some channels, each from the pixel that it came of."""
    pieces = tl.cdiv(width, PIXELS)
    line = tl.program_id(0) // pieces  # of all pictures
    y, picture = line % height, (line // height).to(tl.int64)
    x = (tl.program_id(0) % pieces) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (x < width)[:, None] & (channel < channels)[None, :]
    source = ((picture * (height // 2) + y // 2) * (width // 2) + x // 2)[:, None] * given
    of = (channel[None, :] * 4 + (y % 2) * 2 + (x % 2)[:, None]) // REPEATS
    values = tl.load(pixels + source + of, mask=mask, other=0.0)
    at = ((picture * height + y) * width + x)[:, None] * channels + channel[None, :]
    if UPDATE:
        values = values.to(tl.float32) + tl.load(update + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)
