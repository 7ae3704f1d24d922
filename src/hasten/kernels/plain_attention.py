"""torch's own attention as one step of a graph, over queries, keys and values as the fused passes lay them.

Left to itself the compiler copies all three into the order (batch, heads, tokens, channels), and the result back: in a
FLUX.1-dev step at 1024x1024 that is 4 ms of 128. Both kernels read and write (batch, tokens, heads, channels) as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hasten.kernels.operation import operation


def plain_attention(q: Tensor, k: Tensor, v: Tensor, *, cudnn: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, all (B, S, H, D); cudnn: by cuDNN alone; RuntimeError where it cannot."""
    out: Tensor = torch.ops.hasten.plain_attention(q, k, v, cudnn)
    return out


def _shapes(q: Tensor, k: Tensor, v: Tensor, cudnn: bool) -> Tensor:
    return q.new_empty(q.shape)


@operation("plain_attention", shapes=_shapes)
def _plain_attention(q: Tensor, k: Tensor, v: Tensor, cudnn: bool) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if cudnn and q.is_cuda:
        attended = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    else:
        attended = scaled_dot_product_attention(q, k, v)
    out: Tensor = attended.transpose(1, 2).contiguous()
    return out
