"""Attention with planted sparsity, and a search over it; run as a script it is one of two ranks that share it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from hasten.sparse import BLOCK, Tuning, by_torch

BLOCKS = ("double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.10")


def qkv(seed: int = 0, blocks: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Two heads: in the first each block of queries looks at three blocks of keys, in the second at all alike."""
    made = torch.Generator().manual_seed(seed)
    rows = blocks * BLOCK
    q, k, v = (0.3 * torch.randn(1, 2, rows, 64, generator=made) for _ in range(3))
    ways = torch.linalg.qr(torch.randn(64, blocks, generator=made))[0].T * 5.7
    for i in range(blocks):
        part = slice(i * BLOCK, (i + 1) * BLOCK)
        k[:, 0, part] += ways[i]
        q[:, 0, part] += sum(ways[(i + far) % blocks] for far in range(3))
    v += torch.randn(1, 2, blocks, 64, generator=made).repeat_interleave(BLOCK, 2)
    return q, k, v


def tune(file: Path, *, rank: int = 0, world: int = 1, calls: int = 2, stop_after: int = 99) -> Tuning:
    tuning = Tuning(BLOCKS[:3], file, calls=2, rank=rank, world=world, attend=by_torch)
    for call in range(calls):
        for i, block in enumerate(BLOCKS[:3]):
            if stop_after == 0:
                return tuning
            tuning.see(block, *qkv(10 * call + i, blocks=3))
            stop_after -= 1
    return tuning


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    tune(folder / "two.safetensors", rank=rank, world=2).finish()
    torch.distributed.destroy_process_group()
