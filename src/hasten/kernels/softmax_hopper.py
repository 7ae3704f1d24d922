"""The softmax between the two products of attention8_hopper.py: integer scores to weights in e4m3, in few instructions.

What is not to be done in most steps (lifting scores that are too low, shrinking the accumulator) is jumped over: PTX,
for Gluon has no branch that a warp takes alone.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Scores are counted in eighths of a power of two; one of them is EIGHTH in the bits of a float, so that 2^x is read off
# the straight line between powers of two. It lies above 2^x by up to 6.1 %, within e4m3's own rounding.
EIGHTH = gl.constexpr(1 << 20)
# A row's largest score so far is replaced only by one that is so many eighths above it: most steps shrink nothing.
LATE = gl.constexpr(16)
# The largest weight of a row is at most 448, e4m3's largest number: eighth 126 above 2^-7. This is the weight of the
# score that was the largest.
TOP = gl.constexpr((126 - LATE.value << 20) + (120 << 23))
# So far below the largest, in eighths, a weight is nothing in e4m3 and 2^-16 in the sum.
DEEP = gl.constexpr(200)
# A query's length times a key's, plus the same of the longest key so far, in powers of two: up to that, and for steps
# of V no further below the largest, no score lies so far below another that its weight's bits turn negative, which are
# 134 powers of two below `now`. What is left between is for rounding to 8 bits, a tenth at most, and for V's steps.
FAR = gl.constexpr(110.0)
LOW = gl.constexpr(-8 << 23)
# No score of 128 channels is as large as this.
NEVER = gl.constexpr(4194304.0)


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def inverse(x):
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def log2(x):
    return gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def below(x):
    """The largest whole number that is not above x."""
    return gl.inline_asm_elementwise(
        "cvt.rmi.s32.f32 $0, $1;", "=r,f", [x], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def _by_lane(weight, M: gl.constexpr, N: gl.constexpr):
    """Each row's sum, but for the four lanes that share it: no lane waits for another before the row is done."""
    return gl.sum(gl.sum(gl.reshape(weight, [M, N // 8, 4, 2]), 3), 1)


def _shrink_ptx(count: int) -> tuple[str, str]:
    """PTX that multiplies `count` numbers by their row's factor, unless that is 1 in all rows of the warp."""
    rows = [f"${2 * count + i}" for i in (0, 2)]
    lines = [f"setp.neu.f32 any, {rows[0]}, 0f3F800000;", f"setp.neu.or.f32 any, {rows[1]}, 0f3F800000, any;"]
    lines += ["vote.sync.any.pred any, any, 0xffffffff;", "@!any bra KEEP;"]
    lines += [f"mul.f32 ${i}, ${i}, {rows[i % 4 // 2]};" for i in range(count)]
    constraints = ["=f"] * count + [str(i) for i in range(count)] + ["f"] * count
    return "{ .reg .pred any; " + " ".join(lines) + " KEEP: }", ",".join(constraints)


def _floor_ptx(count: int) -> tuple[str, str]:
    """PTX that lifts `count` scores to their row's least, where the last operand says that any may be below."""
    lines = [f"setp.ne.s32 any, ${3 * count}, 0;", "@!any bra KEEP;"]
    lines += [f"max.s32 ${i}, ${i}, ${2 * count + 2 * (i % 4 // 2)};" for i in range(count)]
    constraints = ["=r"] * count + [str(i) for i in range(count)] + ["r"] * (2 * count)
    return "{ .reg .pred any; " + " ".join(lines) + " KEEP: }", ",".join(constraints)


FLOOR, FLOOR_OPERANDS = (gl.constexpr(part) for part in _floor_ptx(64))
_ptx = {dim: _shrink_ptx(dim // 2) for dim in (64, 128)}
SHRINK_64, SHRINK_64_OPERANDS = (gl.constexpr(part) for part in _ptx[64])
SHRINK_128, SHRINK_128_OPERANDS = (gl.constexpr(part) for part in _ptx[128])


@gluon.jit
def shrunk(acc, factor, D: gl.constexpr):
    """acc (M, D) times factor (M,); nothing is done where that is 1 in all rows of a warp, as in most steps."""
    _, factor = gl.broadcast(acc, factor[:, None])
    if D == 128:
        return gl.inline_asm_elementwise(
            SHRINK_128, SHRINK_128_OPERANDS, [acc, factor], dtype=gl.float32, is_pure=False, pack=64
        )  # fmt: skip
    return gl.inline_asm_elementwise(
        SHRINK_64, SHRINK_64_OPERANDS, [acc, factor], dtype=gl.float32, is_pure=False, pack=32
    )  # fmt: skip


@gluon.jit
def weigh(
    score, q_step, q_inverse, k_step, relative, unit, far, biggest, spare, M: gl.constexpr, N: gl.constexpr,
    TAIL: gl.constexpr,
):  # fmt: skip
    """One block's softmax from its scores (M, N) int32: P in e4m3, in the order of V's keys, and the running state.

    biggest: the row's largest score so far, in whole eighths of a power of two, rounded up. An integer product and sum
    makes a score the bits of its weight; sums beyond 32 bits wrap, and wrap back. far: whether a score may lie so far
    below that its bits would be no weight's; only then are scores lifted. relative: the block's step of V in the units
    that the result is in, which P takes in; unit: its logarithm as bits of a weight. By that, and not by its own bits,
    what the straight line is too high by stays the same on average. spare: how many of the keys are only padding
    (TAIL), whose score is 0. That is no more than the largest, as the keys' mean is taken off them; their values are 0,
    so that the sum alone has to be without them.
    """
    step = q_step * k_step
    most = below(gl.max(score, 1).to(gl.float32) * step) + 1
    now = gl.where(most > biggest + LATE, most, biggest)
    least = (now - DEEP).to(gl.float32) * (q_inverse * inverse(k_step))
    nothing = least > NEVER
    scale = gl.where(nothing, 0, below(step * EIGHTH + 0.5))
    base = gl.where(nothing, 0, TOP + unit - now * EIGHTH)
    floor = below(least) + 1
    _, least_score = gl.broadcast(score, floor[:, None])
    score = gl.inline_asm_elementwise(
        FLOOR, FLOOR_OPERANDS, [score, least_score, gl.full([M, N], far, gl.int32, score.type.layout)], dtype=gl.int32,
        is_pure=False, pack=64,
    )  # fmt: skip
    bits = score * scale[:, None] + base[:, None]
    weight = bits.to(gl.float32, bitcast=True)
    part = _by_lane(weight, M, N)
    if TAIL:
        padding = (gl.maximum(floor, 0) * scale + base).to(gl.float32, bitcast=True) * (spare.to(gl.float32) * 0.25)
        part = part - gl.convert_layout(padding, gl.SliceLayout(1, part.type.layout))[:, None]
    p = weight.to(gl.float8e4nv)
    p = gl.reshape(gl.permute(gl.reshape(p, [M, N // 16, 2, 4, 2]), [0, 1, 3, 2, 4]), [M, N])
    return p, now, part * inverse(relative), _exp2((biggest - now).to(gl.float32) * 0.125)
