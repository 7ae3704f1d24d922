"""Which blocks of 128 keys each block of 128 queries attends to, found from their means without asking the host.

Source of the rule: SpargeAttn (Zhang et al., 2025); the kernel is our own. It knows nothing of tokens but how many
lead as text.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.eight import BLOCK, Eight


@dataclass(frozen=True)
class Chosen:
    """Blocks of keys for each block of queries: `listed` (B H, P / 128, P / 128) int32, the first `count` hold."""

    listed: Tensor
    count: Tensor


def choose(eight: Eight, *, keep: Tensor, alike: Tensor | None, topk: bool = True, text_rows: int = 0) -> Chosen:
    """The blocks of keys that each block of queries attends to, found on the device without asking the host.

    keep, alike: (H,) float32, the share of blocks (topk) or of the softmax's weight to keep, and how alike a block's
    rows must be for its mean to speak for it; None lets every mean speak. The blocks that hold the first `text_rows`
    rows are always on.
    """
    assert eight.means is not None
    both, blocks, _ = eight.means.q.shape
    listed = torch.empty((both, blocks, blocks), dtype=torch.int32, device=keep.device)
    count = torch.empty((both, blocks), dtype=torch.int32, device=keep.device)
    means, width = eight.means, max(32, 1 << (blocks - 1).bit_length())
    with torch.autocast(keep.device.type, enabled=False):
        scores = torch.bmm(means.q, means.k.transpose(1, 2))
    likeness = (keep, keep, keep)
    if alike is not None:
        assert means.q_alike is not None and means.k_alike is not None
        likeness = means.q_alike, means.k_alike, alike
    # One warp has no other to wait for, in some forty sums one after the other.
    _kernels().choose[(blocks, both)](
        scores, *likeness, keep, listed, count, eight.heads, blocks, (text_rows + BLOCK - 1) // BLOCK,
        eight.scale * math.log2(math.e), B=width, TOPK=topk, ALIKE=alike is not None,
        num_warps=1 if width <= 512 else 4,
    )  # fmt: skip
    return Chosen(listed, count)


@functools.cache
def _kernels() -> Any:
    from hasten.kernels import chosen_triton

    return chosen_triton
