"""attention_streams.py: a model's attention from before norm and rotation on, for hosts that hold it there.

Our kernels norm, rotate and join text and image while they turn them into 8 bits, so none of it costs a pass of its
own. Whatever else is chosen for a call gets q, k, v as ever. Each is one step of a graph for torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.attention import Attention, live
from hasten.attention_backends import Ask
from hasten.kernels import rows as fused_rows
from hasten.kernels.eight import Norm, Rope
from hasten.kernels.streams import Streams

Three = tuple[Tensor, Tensor, Tensor]


def asked(q: Tensor, text: Tensor | None) -> Ask:
    """The ask of a call whose image and text are (B, N, H, D) and (B, L, H, D)."""
    rows = q.shape[1] + (0 if text is None else text.shape[1])
    return Ask(q.device, q.dtype, q.shape[2], q.shape[3], rows, rows)


def attend_streams(
    attention: Attention, image: Three, text: Three | None, norms: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    eps: float, rope: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """Attention of the whole sequence, text first, (B, L + N, H, D).

    image, text: q, k, v, (B, N, H, D) and (B, L, H, D); norms: RMS norm's weights of image's q and k, text's q and k;
    rope: cosines and sines (L + N, D) as diffusers has them, or (L + N, D / 2).
    """
    of_text = (None, None, None) if text is None else text
    out: Tensor = torch.ops.hasten.attention_streams(
        *image, *of_text, *norms, *((None, None) if rope is None else rope), eps, attention.number
    )
    return out


def attend_rows(
    attention: Attention, qkv: Tensor, norms: tuple[Tensor, Tensor, Tensor, Tensor], rope: tuple[Tensor, Tensor], *,
    batch: int, length: int, heads: int, joint: bool,
) -> Tensor:  # fmt: skip
    """The same from rows as kernels.rows.norm_rope takes them; norms: text's q and k, image's q and k."""
    out: Tensor = torch.ops.hasten.attention_rows(
        qkv, *norms, *rope, batch, length, heads, joint, 1e-6, attention.number
    )
    return out


@torch.library.custom_op("hasten::attention_streams", mutates_args=())
def _attention_streams(
    q: Tensor, k: Tensor, v: Tensor, text_q: Tensor | None, text_k: Tensor | None, text_v: Tensor | None,
    norm_q: Tensor, norm_k: Tensor, norm_text_q: Tensor | None, norm_text_k: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, eps: float, number: Tensor,
) -> Tensor:  # fmt: skip
    text = None
    if text_q is not None and text_k is not None and text_v is not None:
        text = text_q.transpose(1, 2), text_k.transpose(1, 2), text_v.transpose(1, 2)
    rope = None if cos is None or sin is None else Rope(cos, sin)
    norm = Norm(norm_q, norm_k, eps, norm_text_q, norm_text_k)
    streams = Streams(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), text, norm, rope)
    attention = live(number)
    fused = None if attention is None else attention.attend_fused(streams)
    if fused is not None:
        return fused
    joined = streams.joined()
    out = torch.nn.functional.scaled_dot_product_attention(*joined) if attention is None else attention.attend(*joined)
    return out.to(q.dtype).transpose(1, 2).contiguous()


@_attention_streams.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, text_q: Tensor | None, *others: object) -> Tensor:
    rows = q.shape[1] + (0 if text_q is None else text_q.shape[1])
    return q.new_empty((q.shape[0], rows, q.shape[2], q.shape[3]))


@torch.library.custom_op("hasten::attention_rows", mutates_args=())
def _attention_rows(
    qkv: Tensor, text_q: Tensor, text_k: Tensor, image_q: Tensor, image_k: Tensor, cos: Tensor, sin: Tensor,
    batch: int, length: int, heads: int, joint: bool, eps: float, number: Tensor,
) -> Tensor:  # fmt: skip
    attention = live(number)
    if attention is not None:
        text, image = fused_rows.streams_of(qkv, heads * text_q.shape[0], batch, length, joint)
        of_text, of_image = (
            [t.unflatten(-1, (3, heads, -1))[:, :, i].transpose(1, 2) for i in range(3)] for t in (text, image)
        )
        norm = Norm(image_q, image_k, eps, text_q, text_k)
        text_parts = of_text[0], of_text[1], of_text[2]
        streams = Streams(of_image[0], of_image[1], of_image[2], text_parts, norm, Rope(cos, sin))
        fused = attention.attend_fused(streams)
        if fused is not None:
            return fused
    q, k = torch.ops.hasten.norm_rope(qkv, text_q, text_k, image_q, image_k, cos, sin, batch, length, heads, joint, eps)
    v = fused_rows.values_of(qkv, heads, text_q.shape[0], batch, length, joint)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v) if attention is None else attention.attend(q, k, v)
    return out.to(qkv.dtype).transpose(1, 2).contiguous()


@_attention_rows.register_fake
def _(
    qkv: Tensor, text_q: Tensor, text_k: Tensor, image_q: Tensor, image_k: Tensor, cos: Tensor, sin: Tensor,
    batch: int, length: int, heads: int, joint: bool, eps: float, number: Tensor,
) -> Tensor:  # fmt: skip
    return qkv.new_empty((batch, qkv.shape[0] // batch, heads, text_q.shape[0]))
