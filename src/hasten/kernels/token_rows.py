"""Triton kernels of a partial evaluation: the chosen rows' way into the MLP, and the gated sum. They need Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_gated(  # type: ignore[no-untyped-def]
    out, x, gate, a, gate_b, b, tokens, width, BOTH: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    sample = row // tokens
    total = tl.load(x + row * width + at, mask=inside).to(tl.float32)
    scale = tl.load(gate + sample * width + at, mask=inside).to(tl.float32)
    total += scale * tl.load(a + row * width + at, mask=inside).to(tl.float32)
    if BOTH:
        scale = tl.load(gate_b + sample * width + at, mask=inside).to(tl.float32)
        total += scale * tl.load(b + row * width + at, mask=inside).to(tl.float32)
    if HALF:
        total = tl.where(total > 65504.0, 65504.0, total)
        total = tl.where(total < -65504.0, -65504.0, total)
    tl.store(out + row * width + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_forecasts(  # type: ignore[no-untyped-def]
    out, x, weights, gate, a0, a1, a2, a3, gate_b, b0, b1, b2, b3, tokens, width,
    COUNT: tl.constexpr, BOTH: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    sample = row // tokens
    here = row * width + at
    w0 = tl.load(weights)
    a = w0 * tl.load(a0 + here, mask=inside).to(tl.float32)
    if COUNT > 1:
        w1 = tl.load(weights + 1)
        a += w1 * tl.load(a1 + here, mask=inside).to(tl.float32)
    if COUNT > 2:
        w2 = tl.load(weights + 2)
        a += w2 * tl.load(a2 + here, mask=inside).to(tl.float32)
    if COUNT > 3:
        w3 = tl.load(weights + 3)
        a += w3 * tl.load(a3 + here, mask=inside).to(tl.float32)
    total = tl.load(x + here, mask=inside).to(tl.float32)
    total += tl.load(gate + sample * width + at, mask=inside).to(tl.float32) * a
    if BOTH:
        b = w0 * tl.load(b0 + here, mask=inside).to(tl.float32)
        if COUNT > 1:
            b += w1 * tl.load(b1 + here, mask=inside).to(tl.float32)
        if COUNT > 2:
            b += w2 * tl.load(b2 + here, mask=inside).to(tl.float32)
        if COUNT > 3:
            b += w3 * tl.load(b3 + here, mask=inside).to(tl.float32)
        total += tl.load(gate_b + sample * width + at, mask=inside).to(tl.float32) * b
    if HALF:
        total = tl.where(total > 65504.0, 65504.0, total)
        total = tl.where(total < -65504.0, -65504.0, total)
    tl.store(out + here, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_rows(  # type: ignore[no-untyped-def]
    out, x, index, gate, a, scale, shift, chosen, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    sample = row // chosen
    source = tl.load(index + row) * width
    values = tl.load(x + source + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        weight = tl.load(gate + sample * width + at, mask=inside, other=0.0).to(tl.float32)
        values += weight * tl.load(a + source + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / width
    centred = tl.where(inside, values - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / width
    normed = centred / tl.sqrt(variance + eps)
    factor = 1.0 + tl.load(scale + sample * width + at, mask=inside, other=0.0).to(tl.float32)
    normed = normed * factor + tl.load(shift + sample * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_pairs(  # type: ignore[no-untyped-def]
    out, x, cos, sin, rows, tokens, angles, heads,
    BY_TOKEN: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    # A row's number fits 32 bits, where divisions are cheap; only its address may not.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, PADDED)
    both = tl.arange(0, 2 * PADDED)
    inside = (row < rows)[:, None] & (both < 2 * HALF)[None, :]
    here = row.to(tl.int64)[:, None] * (2 * HALF) + both[None, :]
    # Neighbours are loaded side by side, then parted: every second number would be half of each transfer.
    values = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, (ROWS, PADDED, 2)))
    # Rows are (batch, head, token), or (batch, token, head) BY_TOKEN; angles are (batch or 1, token): `angles` is the
    # first of those two.
    batch = row // (tokens * heads)
    token = (row // heads) % tokens if BY_TOKEN else row % tokens
    angle_at = ((batch % angles) * tokens + token)[:, None] * HALF + pair[None, :]
    known = (row < rows)[:, None] & (pair < HALF)[None, :]
    c = tl.load(cos + angle_at, mask=known, other=0.0)
    s = tl.load(sin + angle_at, mask=known, other=0.0)
    turned = tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), (ROWS, 2 * PADDED))
    tl.store(out + here, turned.to(out.dtype.element_ty), mask=inside)
