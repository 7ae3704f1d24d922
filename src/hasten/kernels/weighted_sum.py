"""The stand-in's arithmetic: base + sum of weights times deltas, summed in float32, in one pass over memory.

On a GPU with Triton one kernel reads each tensor once and writes once; elsewhere torch adds them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_sum(base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """base + sum(w * d), a new tensor of base's shape and dtype; summed in float32 and rounded once.

    base: any shape; deltas: tensors of that shape, float32 or base's dtype; weights: one float for each.
    Deltas of weight 0 are not read. Raises ValueError when the counts differ.
    """
    if len(deltas) != len(weights):
        raise ValueError(
            f"{len(deltas)} deltas and {len(weights)} weights: one weight for each delta is expected."
        )
    terms = [(d, float(w)) for d, w in zip(deltas, weights, strict=True) if w != 0.0]
    if not terms:
        return base.clone()
    if base.dtype == torch.float32 or (
        len(terms) == 1 and terms[0][1] == 1.0 and terms[0][0].dtype == base.dtype
    ):
        total = torch.add(base, terms[0][0], alpha=terms[0][1])
        for delta, weight in terms[1:]:
            total.add_(delta, alpha=weight)
        return total
    total = base.to(torch.float32)
    for delta, weight in terms:
        total.add_(delta, alpha=weight)
    return total.to(base.dtype)
