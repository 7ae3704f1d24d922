"""tokens.py says WHICH tokens are refreshed (ToCa): scores from what a full evaluation saw, ages, and the choice.

It sees tensors, no recipe and no host. Every score is one number for each token, L2-normalised over the tokens of its
stream; the highest are chosen. Source: ToCa (arXiv 2410.05317) and its code for FLUX.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.kernels.received import attention_received
from hasten.kernels.rotation import rotated


def fresh_count(ratio: float, tokens: int) -> int:
    """How many of `tokens` a ratio of 0 to 1 refreshes, rounded down as ToCa does."""
    return min(int(ratio * tokens), tokens)


def normalised(score: Tensor) -> Tensor:
    """The score divided by its L2 norm over the tokens, (B, N) in float32."""
    return torch.nn.functional.normalize(score.float(), dim=-1)


def value_norm(values: Tensor) -> Tensor:
    """The L2 norm of each token's values, mean over heads: (B, N) in float32. values: (B, N, H, D).

    It needs no attention map. Source: DuCa (arXiv 2412.18911).
    """
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
    return norms.mean(-1)


def attention_score(q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, *, queries: int) -> Tensor:
    """The attention that each key receives, (B, N) in float32, from q and k before their rotation.

    q, k: (B, H, N, D). cos, sin: (N, D / 2) or (B, 1, N, D / 2), None for no rotation. queries: so many evenly
    spread ones are asked, 0 asks all: each costs two products with all keys.
    """
    step = 1 if queries <= 0 else max(1, q.shape[2] // queries)
    some = slice(step // 2, None, step)
    if cos is None or sin is None:
        return attention_received(q[:, :, some], k)
    return attention_received(rotated(q[:, :, some], cos[..., some, :], sin[..., some, :]), rotated(k, cos, sin))


def with_spatial_bonus(score: Tensor, grid: tuple[int, int], *, bonus: float, cell: int, first: int = 0) -> Tensor:
    """The score, and for the best image token of each cell of `cell` x `cell` its own score times `bonus` more.

    score: (B, N), the image's grid of (rows, columns) beginning at token `first`. It keeps the chosen ones from
    crowding in one place. Source: ToCa (arXiv 2410.05317), s4; 0.4 there.
    """
    rows, columns = grid
    image = score[:, first : first + rows * columns].unflatten(1, grid).unsqueeze(1)
    spread = torch.nn.functional.pad(image, (0, -columns % cell, 0, -rows % cell), value=float("-inf"))
    best = torch.nn.functional.max_pool2d(spread, cell).repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    best = best[:, :, :rows, :columns]
    out = score.clone()
    out[:, first : first + rows * columns] += torch.where(image == best, image * bonus, 0.0).flatten(1)
    return out


def choose(
    scores: Tensor, ages: Tensor, counts: Sequence[int], *, staleness: float, every: int, limit: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """Each layer's chosen tokens, the highest of score + staleness x age / every, and the ages after it.

    scores, ages: (L, B, N) for the layers of a stage and stream, ages in partial evaluations since the last refresh.
    counts: how many of each layer; limit: the same on the device, (L, 1, 1). Chosen ones come as (B * k,) indices into
    (B * N) rows, best first. Ages grow by one and those of the chosen are 0.
    """
    layers, batch, tokens = scores.shape
    order = (scores + ages * (staleness / every)).argsort(dim=-1, descending=True, stable=True)
    if limit is None:
        limit = torch.tensor(counts, device=scores.device).view(layers, 1, 1)
    chosen = torch.arange(tokens, device=scores.device) < limit
    grown = torch.where(chosen, 0, (ages + 1).gather(-1, order))
    after = torch.empty_like(ages).scatter_(-1, order, grown.to(ages.dtype))
    offset = torch.arange(batch, device=scores.device).view(1, batch, 1) * tokens
    flat = order + offset
    return [flat[layer, :, :k].reshape(-1) for layer, k in enumerate(counts)], after
