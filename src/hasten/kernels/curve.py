"""The order in which an image's tokens are read, so that 128 that follow each other lie together in the picture.

It is Hilbert's curve: a piece of it is a compact patch whatever its length, where rows of a picture are strips. The
sum that attention takes does not depend on the order; which blocks of it are worth taking does.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def hilbert(rows: int, columns: int) -> Tensor:
    """Every place of a grid, row by row counted, in the order of the curve: (rows * columns,) int64.

    A grid that is no power-of-two square is cut out of one.
    """
    side = 1 << (max(rows, columns, 1) - 1).bit_length()
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    along = torch.zeros_like(x)
    half = side // 2
    while half:
        right, low = (x & half > 0).long(), (y & half > 0).long()
        along += half * half * ((3 * right) ^ low)
        # The quarter is turned so that the curve goes on where it left: Hilbert's rule (Skilling, 2004, in the plane).
        mirrored = (low == 0) & (right == 1)
        x, y = (
            torch.where(mirrored, half - 1 - (x & (half - 1)), x),
            torch.where(mirrored, half - 1 - (y & (half - 1)), y),
        )
        x, y = torch.where(low == 0, y, x), torch.where(low == 0, x, y)
        half //= 2
    return along.argsort()


@functools.lru_cache(maxsize=16)
def token_order(text_rows: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Which token is read at each place, int32: the text's as they are, then the picture's along the curve."""
    image = hilbert(rows, columns) + text_rows
    return torch.cat((torch.arange(text_rows), image)).to(device, torch.int32)
