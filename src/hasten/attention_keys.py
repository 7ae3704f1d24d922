"""attention_keys.py leaves keys out of a call instead of masking them: back-ends take no mask, and need none then.

A padded prompt's filling is what is masked in practice: each sample attends to its own leading keys alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ADDED = -10000.0  # diffusers adds this to the scores of what is masked
Kept = tuple[int | Tensor, ...]


def kept_keys(mask: Tensor | None) -> Kept | None:
    """For each sample how many leading keys count, or, where others are masked too, which; None where all do.

    mask: (B, L) of ones and zeros, or (B, 1, L) of what is added to the scores; asks the device once. A sample without
    any is left whole, as a mask that is the same for every key changes nothing.
    """
    if mask is None:
        return None
    rows = (mask.bool() if mask.ndim == 2 else mask[:, 0] > ADDED / 2).cpu()
    if bool(rows.all()):
        return None
    found: list[int | Tensor] = []
    for row in rows:
        count = int(row.sum()) or len(row)
        leading = bool(row[:count].all()) or not bool(row.any())
        found.append(count if leading else row.nonzero().flatten().to(mask.device))
    return tuple(found)


def attend_kept(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, kept: Kept
) -> Tensor:
    """attend(q, k, v), (B, H, N, D), each sample with the keys that it keeps; at once where those are the same."""
    assert len(kept) == len(q), "a mask has a row for each sample"
    if all(isinstance(keys, int) and keys == kept[0] for keys in kept):
        return attend(q, _taken(k, kept[0]), _taken(v, kept[0]))
    rows = range(len(q))
    return torch.cat([attend(q[i : i + 1], *(_taken(t[i : i + 1], kept[i]) for t in (k, v))) for i in rows])


def _taken(t: Tensor, keys: int | Tensor) -> Tensor:
    return t[:, :, :keys] if isinstance(keys, int) else t.index_select(2, keys)
