"""Query and key norm and rotation of two streams in one pass; see rows.py."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.operation import operation
from hasten.kernels.row_parts import dense_last, power_of_two, streams_apart, triton_kernels, use_triton


def norm_rope(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor, Tensor, Tensor],
    rope: tuple[Tensor, Tensor],
    *,
    batch: int,
    length: int,
    heads: int,
    joint: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, S, H, D) of one sequence, queries and keys normed and rotated.

    qkv (B * S, at least 3 * H * D): rows joint or apart; norms: RMSNorm weights (D) of text's q and k, image's q and k;
    rope: cosines and sines (S, D / 2) of neighbouring pairs. Values stay where they lie if they can.
    """
    q, k = torch.ops.hasten.norm_rope(qkv, *norms, *rope, batch, length, heads, joint, 1e-6)
    return q, k, values_of(qkv, heads, norms[0].shape[0], batch, length, joint)


def values_of(qkv: Tensor, heads: int, width: int, batch: int, length: int, joint: bool) -> Tensor:
    """The values (B, S, H, D) of such rows: a view, but for several sequences whose streams lie apart."""
    values = qkv[:, 2 * heads * width : 3 * heads * width]
    if not joint and batch > 1:
        values = torch.cat(streams_apart(values, batch, length, joint=False), 1).flatten(0, 1)
    found: Tensor = values.unflatten(0, (batch, -1)).unflatten(-1, (heads, width))
    return found


def streams_of(qkv: Tensor, inner: int, batch: int, length: int, joint: bool) -> tuple[Tensor, Tensor]:
    """Text's and image's queries, keys and values, (B, L, 3 * inner) and (B, N, 3 * inner), as views of such rows."""
    return streams_apart(qkv[:, : 3 * inner], batch, length, joint)


def _norm_rope_shapes(
    qkv: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    image_q: Tensor,
    image_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    batch: int,
    length: int,
    heads: int,
    joint: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    shape = (batch, qkv.shape[0] // batch, heads, text_q.shape[0])
    return qkv.new_empty(shape), qkv.new_empty(shape)


@operation("norm_rope", shapes=_norm_rope_shapes)
def _norm_rope(
    qkv: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    image_q: Tensor,
    image_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    batch: int,
    length: int,
    heads: int,
    joint: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if use_triton(qkv):
        return norm_rope_by_triton(qkv, (text_q, text_k, image_q, image_k), cos, sin, batch, length, heads, joint, eps)
    return norm_rope_by_torch(qkv, text_q, text_k, image_q, image_k, cos, sin, batch, length, heads, joint, eps)


def norm_rope_by_torch(
    qkv: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    image_q: Tensor,
    image_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    batch: int,
    length: int,
    heads: int,
    joint: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """norm_rope's queries and keys by torch's own operations."""
    total = qkv.shape[0] // batch
    inner = heads * text_q.shape[0]
    text, image = streams_apart(qkv[:, : 3 * inner], batch, length, joint)
    q, k, _ = (t.unflatten(-1, (heads, -1)) for t in torch.cat([text, image], 1).chunk(3, -1))
    is_text = (torch.arange(total, device=qkv.device) < length)[None, :, None, None]
    out = []
    for x, of_text, of_image in ((q, text_q, image_q), (k, text_k, image_k)):
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * torch.where(is_text, of_text, of_image).float()
        even, odd = x[..., 0::2], x[..., 1::2]
        c, s = cos.float()[None, :, None], sin.float()[None, :, None]
        out.append(torch.stack([even * c - odd * s, odd * c + even * s], -1).flatten(-2).to(qkv.dtype))
    return out[0], out[1]


def norm_rope_by_triton(
    qkv: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    batch: int,
    length: int,
    heads: int,
    joint: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """norm_rope's queries and keys by its kernel; also the interpreter's way in. The heads' width: a power of two."""
    module = triton_kernels()
    qkv = dense_last(qkv)
    total, width = qkv.shape[0] // batch, weights[0].shape[0]
    q, k = (qkv.new_empty((batch, total, heads, width)) for _ in range(2))
    if total:
        module.launch(
            module.norm_rope,
            (total, batch, 2),
            *(qkv, *weights, cos, sin, q, k, length, total - length, batch, heads, qkv.stride(0)),
            *(cos.stride(0), cos.stride(1), sin.stride(0), sin.stride(1), eps),
            JOINT=joint,
            HEADS=power_of_two(heads),
            HALF=width // 2,
            num_warps=4,
        )
    return q, k
