"""The Triton kernel that chooses, for every block of 128 queries, the blocks of keys it attends to.

Source of the rule: SpargeAttn (Zhang et al., 2025). This module imports Triton as it is loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def choose(
    scores, q_alike, k_alike, alike, keep, listed, count, heads, blocks, always, scale,
    B: tl.constexpr, TOPK: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """One row of `listed`: the blocks of keys of one block of queries, in order, and how many they are.

    The mean query's softmax over the mean keys, of which `scores` are the products, says what a block weighs. TOPK: the
    heaviest, a share `keep` of all; otherwise the heaviest that weigh `keep` together at most, one at least. A block
    whose rows are less alike than `alike` is not spoken for by its mean (ALIKE): as keys it is always taken, as queries
    it takes all. So do the first `always` blocks, the text. No host is asked; alike and keep are (H,).
    """
    block = tl.program_id(0)
    batch_head = tl.program_id(1).to(tl.int64)
    head = batch_head % heads
    at = tl.arange(0, B)
    inside = at < blocks
    mine = batch_head * blocks + block
    score = tl.load(scores + mine * blocks + at, mask=inside, other=0.0) * scale
    spoken = inside
    if ALIKE:
        least = tl.load(alike + head)
        spoken &= tl.load(k_alike + batch_head * blocks + at, mask=inside, other=0.0) > least
    score = tl.where(spoken, score, float("-inf"))
    top = tl.max(score, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.where(spoken, tl.exp2(score - top), 0.0)
    if TOPK:
        # At least one, and a whole number without the error of keep * blocks in float32.
        limit = tl.maximum(tl.floor(tl.load(keep + head) * blocks + 1e-4), 1.0)
        share = spoken.to(tl.float32)
    else:
        limit = tl.load(keep + head)
        share = weight / tl.maximum(tl.sum(weight, 0), 1e-30)
    # The lowest score down to which the shares stay within the limit, by halving: `high` keeps within it, `low` not.
    low = tl.minimum(tl.min(tl.where(spoken, score, float("inf")), 0), top) - 1.0
    high = top
    if tl.sum(share, 0) <= limit:
        high = low
    else:
        for _ in range(32):
            middle = 0.5 * (low + high)
            fits = tl.sum(tl.where(score >= middle, share, 0.0), 0) <= limit
            high = tl.where(fits, middle, high)
            low = tl.where(fits, low, middle)
    taken = (spoken & (score >= high)) | (score == top) | (inside & (spoken == 0)) | (at < always)
    everything = block < always
    if ALIKE:
        everything |= tl.load(q_alike + mine) <= least
    everything |= tl.sum((taken & inside).to(tl.int32), 0) == 0  # no score is a number: whoever attends waits for some
    taken = tl.where(everything, inside, taken & inside)
    number = taken.to(tl.int32)
    place = tl.cumsum(number, 0) - number
    tl.store(listed + mine * blocks + place, at, mask=taken)
    tl.store(count + mine, tl.sum(number, 0))
