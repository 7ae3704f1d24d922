"""The 8-bit attention of attention8_triton.py once more in Gluon, for Hopper: loads apart, three warp groups a tile.

One warp fetches keys and values by TMA; three warp groups of 64 rows each take them from shared memory, so a block of
keys is read from L2 once for 192 rows, where the plain kernel's 64 rows keep L2 at its limit. While one group is in
its softmax another multiplies. Gluon is experimental: where this module does not compile or its result is not right,
attention8.py uses the plain kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2_448 = gl.constexpr(8.807354922057604)
# int32 s below 2^22 in size plus this number has the bits of the float 12582912 + s: a conversion on the other pipe.
FLOAT_BITS = gl.constexpr(0x4B400000)
FLOAT_BASE = gl.constexpr(12582912.0)
# 1.5 * 2^11 + 127: adding it leaves x + 127 with 12 bits after the point at the low end of the float's bits.
LINE_BASE = gl.constexpr(3072.0 + 127.0)
# The straight line between powers of two lies above 2^x by up to 6.1 %; less this in the exponent it lies around it.
LINE_SHIFT = gl.constexpr(0.058)
LINE_LEAST = gl.constexpr(3072.0 + 127.0 - 24.0)


@gluon.jit
def _item(item, whole, splits, row_blocks, key_blocks):
    """(tile, first block of keys, one past the last): the last tiles are cut along the keys so that none waits."""
    rest = item - whole
    cut = item >= whole
    tile = gl.where(cut, whole + rest // splits, item)
    part = rest % splits
    low = gl.where(cut, part * key_blocks // splits, 0)
    high = gl.where(cut, (part + 1) * key_blocks // splits, key_blocks)
    return tile, low, high


@gluon.jit
def _fetch(
    q_desc, k_desc, v_desc, q_mem, k_mem, v_mem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    row_blocks, items, whole, splits, key_blocks, padded,
    D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads, for every item of this program in turn."""
    count = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, low, high = _item(item, whole, splits, row_blocks, key_blocks)
        head = tile // row_blocks
        row = head * padded + (tile % row_blocks) * GROUPS * M
        for group in gl.static_range(GROUPS):
            mbarrier.wait(q_empty.index(group), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(group), M * D)
            tma.async_copy_global_to_shared(q_desc, [row + group * M, 0], q_full.index(group), q_mem.index(group))
        turn += 1  # noqa: SIM113 - a loop of the device
        for block in range(low, high):
            slot = count % STAGES
            phase = ((count // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), N * D)
            tma.async_copy_global_to_shared(
                k_desc, [head * padded + block * N, 0], k_full.index(slot), k_mem.index(slot)
            )
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), N * D)
            tma.async_copy_global_to_shared(v_desc, [head * D, block * N], v_full.index(slot), v_mem.index(slot))
            count += 1


@gluon.jit
def _weigh(
    score, q_step, k_step, v_now, v_before, biggest, total, left, one,
    M: gl.constexpr, N: gl.constexpr, TAIL: gl.constexpr,
    score_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """One block's softmax: P in e4m3 as the next product wants it, and the running state."""
    step = q_step * k_step
    value = (score * one + FLOAT_BITS).to(gl.float32, bitcast=True)
    if TAIL:
        keys = gl.arange(0, N, gl.SliceLayout(0, score_layout))
        value = gl.where((keys < left)[None, :], value, float("-inf"))
    now = gl.maximum(biggest, (gl.max(value, 1) - FLOAT_BASE) * step)
    base = FLOAT_BASE * step + (now - LOG2_448)
    shrink = gl.exp2(biggest - now)
    even, odd = gl.split(gl.reshape(value, [M, N // 2, 2]))
    half: gl.constexpr = gl.SliceLayout(1, even.type.layout)
    half_step = gl.convert_layout(step, half)
    half_base = gl.convert_layout(base, half)
    exact = gl.exp2(even * half_step[:, None] - half_base[:, None])
    line = odd * half_step[:, None] - (half_base - (LINE_BASE - LINE_SHIFT))[:, None]
    line = gl.maximum(line, LINE_LEAST).to(gl.int32, bitcast=True) * (one << 11)
    weight = gl.reshape(gl.join(exact, line.to(gl.float32, bitcast=True)), [M, N])
    weight = gl.convert_layout(weight, score_layout, assert_trivial=True)
    total = total * shrink + gl.sum(weight, 1)
    shrink = shrink * (v_before / v_now)
    p = weight.to(gl.float8e4nv)
    p = gl.reshape(gl.permute(gl.reshape(p, [M, N // 16, 2, 4, 2]), [0, 1, 3, 2, 4]), [M, N])
    p = gl.convert_layout(p, p_layout, assert_trivial=True)
    return p, now, total, shrink


@gluon.jit
def _consume(
    group: gl.constexpr, q_scale, k_scale, v_scale, out, cut_out, cut_lse, q_mem, k_mem, v_mem,
    q_full, q_empty, k_full, k_empty, v_full, v_empty,
    out_batch, out_head, out_row, heads, rows, padded, row_blocks, items, whole, splits, key_blocks,
    D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr,
   
):  # fmt: skip
    """One warp group: 64 rows of every item of this program."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 4)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)
    PER: gl.constexpr = 128 // N
    count = 0
    turn = 0
    no_score = gl.zeros([M, N], gl.int32, score_layout)
    no_out = gl.zeros([M, D], gl.float32, out_layout)
    q = q_mem.index(group)
    # A one that the compiler cannot see: it keeps the multiply-add, which another pipe than the maximum's carries out.
    one = 1 + (heads >> 24)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, low, high = _item(item, whole, splits, row_blocks, key_blocks)
        batch_head = tile // row_blocks
        start = (tile % row_blocks) * GROUPS * M + group * M
        at = start + gl.arange(0, M, row_layout)
        q_step = gl.load(q_scale + batch_head.to(gl.int64) * padded + at, mask=at < padded, other=1.0)
        k_steps = k_scale + batch_head * (padded // 128)
        v_steps = v_scale + batch_head * (padded // 128)
        biggest = gl.full([M], float("-inf"), gl.float32, row_layout)
        total = gl.zeros([M], gl.float32, row_layout)
        acc = gl.zeros([M, D], gl.float32, out_layout)
        v_before = 1.0
        k_now = gl.load(k_steps + low // PER)
        v_now = gl.load(v_steps + low // PER)
        mbarrier.wait(q_full.index(group), turn & 1)
        turn += 1  # noqa: SIM113 - a loop of the device
        for block in range(low, high - 1):
            slot = count % STAGES
            phase = (count // STAGES) & 1
            mbarrier.wait(k_full.index(slot), phase)
            score = warpgroup_mma(q, k_mem.index(slot).permute((1, 0)), no_score, use_acc=False, is_async=True)
            k_next = gl.load(k_steps + (block + 1) // PER)
            v_next = gl.load(v_steps + (block + 1) // PER)
            score = warpgroup_mma_wait(0, deps=(score,))
            gl.thread_barrier()
            mbarrier.arrive(k_empty.index(slot))
            p, biggest, total, shrink = _weigh(
                score, q_step, k_now, v_now, v_before, biggest, total, 0, one, M, N, False, score_layout,
                p_layout,
            )  # fmt: skip
            shrink = gl.convert_layout(shrink, out_rows)
            mbarrier.wait(v_full.index(slot), phase)
            now = warpgroup_mma(p, v_mem.index(slot).permute((1, 0)), no_out, use_acc=False, is_async=True)
            now = warpgroup_mma_wait(0, deps=(now,))
            gl.thread_barrier()
            mbarrier.arrive(v_empty.index(slot))
            acc = acc * shrink[:, None] + now
            v_before = v_now
            k_now = k_next
            v_now = v_next
            count += 1
        slot = count % STAGES
        phase = (count // STAGES) & 1
        mbarrier.wait(k_full.index(slot), phase)
        score = warpgroup_mma(q, k_mem.index(slot).permute((1, 0)), no_score, use_acc=False, is_async=True)
        score = warpgroup_mma_wait(0, deps=(score,))
        gl.thread_barrier()
        mbarrier.arrive(k_empty.index(slot))
        mbarrier.arrive(q_empty.index(group))
        p, biggest, total, shrink = _weigh(
            score, q_step, k_now, v_now, v_before, biggest, total, rows - (high - 1) * N, one, M, N, TAIL,
            score_layout, p_layout,
        )  # fmt: skip
        mbarrier.wait(v_full.index(slot), phase)
        last = warpgroup_mma(p, v_mem.index(slot).permute((1, 0)), no_out, use_acc=False, is_async=True)
        last = warpgroup_mma_wait(0, deps=(last,))
        gl.thread_barrier()
        mbarrier.arrive(v_empty.index(slot))
        count += 1
        shrink = gl.convert_layout(shrink, out_rows)
        scale = gl.convert_layout(v_now / total, out_rows)
        acc = (acc * shrink[:, None] + last) * scale[:, None]
        cols = gl.arange(0, D, gl.SliceLayout(0, out_layout))
        if item < whole:
            at_out = start + gl.arange(0, M, out_rows)
            place = out + (batch_head // heads).to(gl.int64) * out_batch + (batch_head % heads) * out_head
            place = place + at_out[:, None].to(gl.int64) * out_row + cols[None, :]
            gl.store(place, acc.to(out.dtype.element_ty), mask=(at_out < rows)[:, None])
        else:
            first = (item - whole) * GROUPS * M + group * M
            at_cut = first + gl.arange(0, M, out_rows)
            gl.store(cut_out + at_cut[:, None] * D + cols[None, :], acc)
            gl.store(cut_lse + first + gl.arange(0, M, row_layout), biggest + gl.log2(total))


@gluon.jit
def attend(
    q_desc, k_desc, v_desc, q_scale, k_scale, v_scale, out, cut_out, cut_lse, out_batch, out_head, out_row,
    heads, rows, padded, row_blocks, items, whole, splits, key_blocks,
    D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """softmax(q k^T) v in tiles of 3 M rows; as many programs as the GPU has multiprocessors, at most."""
    GROUPS: gl.constexpr = 3
    q_mem = gl.allocate_shared_memory(gl.int8, [GROUPS, M, D], q_desc.layout)
    k_mem = gl.allocate_shared_memory(gl.int8, [STAGES, N, D], k_desc.layout)
    v_mem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, D, N], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    zero: gl.constexpr = 0
    one: gl.constexpr = 1
    two: gl.constexpr = 2
    gl.warp_specialize(
        [
            (_consume, (zero, q_scale, k_scale, v_scale, out, cut_out, cut_lse, q_mem, k_mem, v_mem, q_full, q_empty,
                k_full, k_empty, v_full, v_empty, out_batch, out_head, out_row, heads, rows, padded, row_blocks, items,
                whole, splits, key_blocks, D, M, N, GROUPS, STAGES, TAIL)),
            (_consume, (one, q_scale, k_scale, v_scale, out, cut_out, cut_lse, q_mem, k_mem, v_mem, q_full, q_empty,
                k_full, k_empty, v_full, v_empty, out_batch, out_head, out_row, heads, rows, padded, row_blocks, items,
                whole, splits, key_blocks, D, M, N, GROUPS, STAGES, TAIL)),
            (_consume, (two, q_scale, k_scale, v_scale, out, cut_out, cut_lse, q_mem, k_mem, v_mem, q_full, q_empty,
                k_full, k_empty, v_full, v_empty, out_batch, out_head, out_row, heads, rows, padded, row_blocks, items,
                whole, splits, key_blocks, D, M, N, GROUPS, STAGES, TAIL)),
            (_fetch, (q_desc, k_desc, v_desc, q_mem, k_mem, v_mem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                row_blocks, items, whole, splits, key_blocks, padded, D, M, N, GROUPS, STAGES)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )  # fmt: skip


@triton.jit
def join_cut(
    cut_out, cut_lse, out, out_batch, out_head, out_row, heads, rows, row_blocks, whole, splits,
    D: tl.constexpr, TILE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The tiles that were cut along the keys, put together: R rows of one of them."""
    cut = tl.program_id(0)
    tile = whole + cut
    batch_head = tile // row_blocks
    within = tl.program_id(1) * R + tl.arange(0, R)
    at = (tile % row_blocks) * TILE + within
    cols = tl.arange(0, D)
    biggest = tl.full((R,), float("-inf"), tl.float32)
    for part in range(splits):
        biggest = tl.maximum(biggest, tl.load(cut_lse + (cut * splits + part) * TILE + within))
    total = tl.zeros((R,), tl.float32)
    acc = tl.zeros((R, D), tl.float32)
    for part in range(splits):
        row = (cut * splits + part) * TILE + within
        weight = tl.exp2(tl.load(cut_lse + row) - biggest)
        total += weight
        acc += weight[:, None] * tl.load(cut_out + row[:, None] * D + cols[None, :])
    place = out + (batch_head // heads).to(tl.int64) * out_batch + (batch_head % heads) * out_head
    place += at[:, None].to(tl.int64) * out_row + cols[None, :]
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=(at < rows)[:, None])
