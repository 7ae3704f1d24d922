"""The 8-bit attention of attention8_triton.py once more in Gluon, for Hopper: loads apart, three warp groups a tile.

One warp fetches keys and values by TMA; three warp groups of 64 rows each take them from shared memory, so a block of
keys is read from L2 once for 192 rows, where the plain kernel's 64 rows keep L2 at its limit. A group asks for the
next block's scores and for this block's P V together, and is in its softmax while the tensor cores work on the second.
Gluon is experimental: where this module does not compile or its result is not right, attention8.py uses the plain
kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hasten.kernels.softmax_hopper import FAR, LOW, below, inverse, log2, shrunk, weigh

# Two names that Triton changed after 3.6.
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

# The tensor cores keep only some 13 bits of a sum of e4m3 products: after so many blocks of keys it is added up in
# float32 in shared memory.
TOGETHER = gl.constexpr(32)

# How attention8.py launches it: groups of 64 rows, blocks of keys in flight, the registers of a group's thread. Shared
# memory has room for no more. Blocks of keys are chosen for 128 rows at a time: two groups.
DENSE = {"GROUPS": 3, "STAGES": 3, "REGISTERS": 160}
CHOSEN = {"GROUPS": 2, "STAGES": 4, "REGISTERS": 232}


@gluon.jit
def _item(item, count, whole, splits, row_blocks, key_blocks, SPARSE: gl.constexpr):
    """(tile, first block of keys, one past the last): the last tiles are cut along the keys so that none waits.

    SPARSE: of a tile's own list of blocks, which is `count` of it long. Text has the longest, at the same rows of each
    head: rows are turned on from head to head, so that no program has all of those.
    """
    if SPARSE:
        head = item // row_blocks
        tile = head * row_blocks + (item + 5 * head) % row_blocks
        return tile, 0, gl.load(count + tile)
    rest = item - whole
    cut = item >= whole
    tile = gl.where(cut, whole + rest // splits, item)
    part = rest % splits
    low = gl.where(cut, part * key_blocks // splits, 0)
    high = gl.where(cut, (part + 1) * key_blocks // splits, key_blocks)
    return tile, low, high


@gluon.jit
def _block(place, tile, listed, key_blocks, SPARSE: gl.constexpr):
    """Which block of keys comes at that place."""
    if SPARSE:
        return gl.load(listed + tile.to(gl.int64) * key_blocks + place)
    return place


@gluon.jit
def _fetch(
    given,
    D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    SPARSE: gl.constexpr,
):  # fmt: skip
    """The warp that loads, for every item of this program in turn."""
    (
        q_desc, k_desc, v_desc, listed, listed_count, q_mem, k_mem, v_mem, q_full, q_empty, k_full, k_empty, v_full,
        v_empty, row_blocks, items, whole, splits, key_blocks, padded,
    ) = given  # fmt: skip
    count = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, low, high = _item(item, listed_count, whole, splits, row_blocks, key_blocks, SPARSE)
        head = tile // row_blocks
        row = head * padded + (tile % row_blocks) * GROUPS * M
        for group in gl.static_range(GROUPS):
            place_q = (turn & 1) * GROUPS + group
            mbarrier.wait(q_empty.index(place_q), ((turn >> 1) & 1) ^ 1)
            mbarrier.expect(q_full.index(place_q), M * D)
            fetch(q_desc, [row + group * M, 0], q_full.index(place_q), q_mem.index(place_q))
        turn += 1  # noqa: SIM113 - a loop of the device
        block = _block(low, tile, listed, key_blocks, SPARSE)
        for place in range(low, high):
            after = _block(gl.minimum(place + 1, high - 1), tile, listed, key_blocks, SPARSE)
            slot = count % STAGES
            phase = ((count // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), N * D)
            fetch(k_desc, [head * padded + block * N, 0], k_full.index(slot), k_mem.index(slot))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), N * D)
            fetch(v_desc, [head * D, block * N], v_full.index(slot), v_mem.index(slot))
            block = after
            count += 1


@gluon.jit
def _consume(
    group: gl.constexpr, given,
    D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr,
    SPARSE: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """One warp group: 64 rows of every item of this program."""
    (
        listed, listed_count, order, q_scale, k_scale, v_scale, q_length, k_length, v_mean, out, cut_out, cut_lse,
        q_mem, k_mem, v_mem, p_mem, sum_mem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
        out_batch, out_head, out_row, heads, rows, padded, row_blocks, items, whole, splits, key_blocks,
    ) = given  # fmt: skip
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)
    count = 0
    turn = 0
    no_score = gl.zeros([M, N], gl.int32, score_layout)
    no_out = gl.zeros([M, D], gl.float32, out_layout)
    p_own = p_mem.index(group)
    sum_own = sum_mem.index(group)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, low, high = _item(item, listed_count, whole, splits, row_blocks, key_blocks, SPARSE)
        batch_head = tile // row_blocks
        start = (tile % row_blocks) * GROUPS * M + group * M
        at = start + gl.arange(0, M, row_layout)
        q_step = gl.load(q_scale + batch_head.to(gl.int64) * padded + at, mask=at < padded, other=1.0) * 8.0
        q_inverse = 1.0 / q_step
        k_steps = k_scale + batch_head * (padded // 128)
        v_steps = v_scale + batch_head * (padded // 128)
        k_lengths = k_length + batch_head * (padded // 128)
        q_far = gl.max(gl.load(q_length + batch_head.to(gl.int64) * padded + at, mask=at < padded, other=0.0), 0)
        block = _block(low, tile, listed, key_blocks, SPARSE)
        after = _block(gl.minimum(low + 1, high - 1), tile, listed, key_blocks, SPARSE)
        k_now = gl.load(k_steps + block)
        v_now = gl.load(v_steps + block)
        # Steps are asked for one block ahead.
        k_next = gl.load(k_steps + after)
        longest = gl.load(k_lengths + block)
        far_next = gl.load(k_lengths + after)
        v_next = gl.load(v_steps + after)
        acc = no_out
        since = gl.full([M], 1.0, gl.float32, out_rows)
        sum_own.store(no_out.to(gl.bfloat16))
        # Queries have two places, so that the next item's are fetched, and its keys, while this one's are at work.
        place_q = (turn & 1) * GROUPS + group
        q = q_mem.index(place_q)
        mbarrier.wait(q_full.index(place_q), (turn >> 1) & 1)
        turn += 1  # noqa: SIM113 - a loop of the device
        slot = count % STAGES
        mbarrier.wait(k_full.index(slot), (count // STAGES) & 1)
        score = warpgroup_mma(q, k_mem.index(slot).permute((1, 0)), no_score, use_acc=False, is_async=True)
        score = warpgroup_mma_wait(0, deps=(score,))
        thread_barrier()
        mbarrier.arrive(k_empty.index(slot))
        nothing = gl.full([M], -1000000, gl.int32, row_layout)
        one = v_now * inverse(v_now)
        spare = gl.maximum((block + 1) * N - rows, 0)
        p, biggest, total, _ = weigh(score, q_step, q_inverse, k_now, one, 0, 1, nothing, spare, M, N, TAIL)
        p_own.store(p)
        for place in range(low + 1, high):
            block = after
            k_now = k_next
            v_here = gl.maximum(v_now, v_next)
            relative = v_next * inverse(v_here)
            unit = below(log2(relative) * 8388608.0)
            # The largest score so far may be an earlier block's, whose keys were longer.
            longest = gl.maximum(longest, far_next)
            far = gl.where((q_far * (longest + far_next) <= FAR) & (unit >= LOW), 0, 1)
            after = _block(gl.minimum(place + 1, high - 1), tile, listed, key_blocks, SPARSE)
            fence_async_shared()
            thread_barrier()
            slot = count % STAGES
            following = (count + 1) % STAGES
            mbarrier.wait(k_full.index(following), ((count + 1) // STAGES) & 1)
            score = warpgroup_mma(
                q, k_mem.index(following).permute((1, 0)), no_score, use_acc=False, is_async=True
            )  # fmt: skip
            mbarrier.wait(v_full.index(slot), (count // STAGES) & 1)
            acc = warpgroup_mma(p_own, v_mem.index(slot).permute((1, 0)), acc, is_async=True)
            k_next = gl.load(k_steps + after)
            far_next = gl.load(k_lengths + after)
            v_next = gl.load(v_steps + after)
            score = warpgroup_mma_wait(1, deps=(score,))
            spare = gl.maximum((block + 1) * N - rows, 0)
            p, biggest, part, shrink = weigh(
                score, q_step, q_inverse, k_now, relative, unit, far, biggest, spare, M, N, TAIL
            )  # fmt: skip
            total = total * gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None] + part
            # The accumulator is in units of the largest step of V so far, which seldom changes.
            shrink = gl.convert_layout(shrink * gl.where(v_here > v_now, v_now * inverse(v_here), 1.0), out_rows)
            v_now = v_here
            acc = warpgroup_mma_wait(0, deps=(acc,))
            thread_barrier()
            mbarrier.arrive(k_empty.index(following))
            mbarrier.arrive(v_empty.index(slot))
            p_own.store(p)
            acc = shrunk(acc, shrink, D)
            since = since * shrink
            if (place - low) % TOGETHER == 0:
                before = sum_own.load(out_layout).to(gl.float32)
                sum_own.store((before * since[:, None] + acc).to(gl.bfloat16))
                acc = no_out
                since = gl.full([M], 1.0, gl.float32, out_rows)
            count += 1
        mbarrier.arrive(q_empty.index(place_q))
        slot = count % STAGES
        fence_async_shared()
        thread_barrier()
        mbarrier.wait(v_full.index(slot), (count // STAGES) & 1)
        acc = warpgroup_mma(p_own, v_mem.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        thread_barrier()
        mbarrier.arrive(v_empty.index(slot))
        count += 1
        acc = sum_own.load(out_layout).to(gl.float32) * since[:, None] + acc
        whole_sum = gl.convert_layout(gl.sum(total, 1), row_layout)
        acc = acc * gl.convert_layout(v_now / whole_sum, out_rows)[:, None]
        cols = gl.arange(0, D, gl.SliceLayout(0, out_layout))
        acc = acc + gl.load(v_mean + batch_head * D + cols)[None, :]
        if item < whole:
            at_out = start + gl.arange(0, M, out_rows)
            to = gl.load(order + at_out, mask=at_out < rows, other=0) if ORDER else at_out
            target = out + (batch_head // heads).to(gl.int64) * out_batch + (batch_head % heads) * out_head
            target = target + to[:, None].to(gl.int64) * out_row + cols[None, :]
            gl.store(target, acc.to(out.dtype.element_ty), mask=(at_out < rows)[:, None])
        else:
            first = (item - whole) * GROUPS * M + group * M
            at_cut = first + gl.arange(0, M, out_rows)
            gl.store(cut_out + at_cut[:, None] * D + cols[None, :], acc)
            gl.store(
                cut_lse + first + gl.arange(0, M, row_layout), biggest.to(gl.float32) * 0.125 + gl.log2(whole_sum)
            )  # fmt: skip


# One compilation for every length.
@gluon.jit(do_not_specialize=["heads", "rows", "row_blocks", "items", "whole", "splits", "key_blocks"])
def attend(
    q_desc, k_desc, v_desc, listed, listed_count, order, q_scale, k_scale, v_scale, q_length, k_length, v_mean, out,
    cut_out, cut_lse, out_batch, out_head, out_row,
    heads, rows, padded, row_blocks, items, whole, splits, key_blocks,
    D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr,
    REGISTERS: gl.constexpr, GROUPS: gl.constexpr, SPARSE: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """softmax(q k^T) v in tiles of GROUPS M rows; as many programs as the GPU has multiprocessors, at most.

    SPARSE: GROUPS M rows, 128 of them, share the blocks of keys in `listed` (B H, P / 128, P / 128), `listed_count` of
    them. ORDER: the row at place i goes to order[i].
    """
    q_mem = gl.allocate_shared_memory(gl.int8, [2 * GROUPS, M, D], q_desc.layout)
    k_mem = gl.allocate_shared_memory(gl.int8, [STAGES, N, D], k_desc.layout)
    v_mem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, D, N], v_desc.layout)
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    p_mem = gl.allocate_shared_memory(gl.float8e4nv, [GROUPS, M, N], flat)
    sum_mem = gl.allocate_shared_memory(gl.bfloat16, [GROUPS, M, D], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2 * GROUPS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * GROUPS):
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
    given = (
        listed, listed_count, order, q_scale, k_scale, v_scale, q_length, k_length, v_mean, out, cut_out, cut_lse,
        q_mem, k_mem, v_mem, p_mem, sum_mem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
        out_batch, out_head, out_row, heads, rows, padded, row_blocks, items, whole, splits, key_blocks,
    )  # fmt: skip
    fetched = (
        q_desc, k_desc, v_desc, listed, listed_count, q_mem, k_mem, v_mem, q_full, q_empty, k_full, k_empty, v_full,
        v_empty, row_blocks, items, whole, splits, key_blocks, padded,
    )  # fmt: skip
    # Constants stand in each call: kept in a variable they would be none any more.
    if GROUPS == 3:
        gl.warp_specialize(
            [
                (_consume, (zero, given, D, M, N, GROUPS, STAGES, TAIL, SPARSE, ORDER)),
                (_consume, (one, given, D, M, N, GROUPS, STAGES, TAIL, SPARSE, ORDER)),
                (_consume, (two, given, D, M, N, GROUPS, STAGES, TAIL, SPARSE, ORDER)),
                (_fetch, (fetched, D, M, N, GROUPS, STAGES, SPARSE)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (zero, given, D, M, N, GROUPS, STAGES, TAIL, SPARSE, ORDER)),
                (_consume, (one, given, D, M, N, GROUPS, STAGES, TAIL, SPARSE, ORDER)),
                (_fetch, (fetched, D, M, N, GROUPS, STAGES, SPARSE)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )


@triton.jit(do_not_specialize=["heads", "rows", "row_blocks", "whole", "splits"])
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
