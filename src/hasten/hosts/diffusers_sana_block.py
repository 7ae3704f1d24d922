"""diffusers_sana_block.py: Sana's block with its tokens left as they lie, and when it may stand for diffusers' own.

The 1x1 convolutions of the feed-forward are products of rows, the depthwise one and its gate one kernel, the linear
attention two; the rest is left to the compiler. Numbers differ from the block's own by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.kernels.gated_conv import gated_conv
from hasten.kernels.linear_attention import linear_attention
from hasten.kernels.rows import norm_modulate
from hasten.quantize import Linear8

EPS = 1e-6
LARGEST_HALF = torch.finfo(torch.float16).max


class FusedSana(nn.Module):
    """Stands for a SanaTransformerBlock: the same arguments, the same results but for rounding."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        height: int = 0,
        width: int = 0,
    ) -> Tensor:
        """The image tokens after the block, (B, N, C)."""
        block: Any = self.block
        if attention_mask is not None or not still_plain(block):
            return block._call_impl(  # type: ignore[no-any-return]
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep, height, width
            )
        assert timestep is not None
        # Six parts of C each, in FLUX's order: shift, scale, gate around attention, then around the feed-forward.
        mods = (block.scale_shift_table.flatten() + timestep).to(hidden_states.dtype)
        gate, gate_ff = (mods.unflatten(1, (6, -1))[:, i : i + 1] for i in (2, 5))
        given = _norm_modulate(hidden_states, mods, 0)
        hidden_states = hidden_states + gate * _self_attention(block.attn1, given)
        hidden_states = hidden_states + block.attn2(
            hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        given = _norm_modulate(hidden_states, mods, 3)
        out: Tensor = hidden_states + gate_ff * _feed_forward(block.ff, given, height, width)
        return out


def with_dense_tokens(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`call`, which runs a block, on tokens that lie row by row.

    The first block gets them as the patch embedding's convolution left them, channels first. Products of those are
    rounded otherwise, and a recording reads its inputs row by row: a first step would differ from the next run's.
    """

    def run(*args: Any, **kwargs: Any) -> Tensor:
        if args:
            return call(args[0].contiguous(), *args[1:], **kwargs)
        return call(**{**kwargs, "hidden_states": kwargs["hidden_states"].contiguous()})

    return run


def _norm_modulate(hidden: Tensor, mods: Tensor, shift: int) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, (B, N, C); the scale's part follows the shift's."""
    rows, _ = norm_modulate(hidden[:, :0], hidden, mods, mods, shift=shift, scale=shift + 1, joint=True)
    return rows.view_as(hidden)


def _self_attention(attn: Any, given: Tensor) -> Tensor:
    q, k, v = attn.to_q(given), attn.to_k(given), attn.to_v(given)
    if attn.norm_q is not None:
        q, k = attn.norm_q(q), attn.norm_k(k)
    out: Tensor = attn.to_out[0](linear_attention(q, k, v, attn.heads))
    return out.clip(-LARGEST_HALF, LARGEST_HALF) if out.dtype == torch.float16 else out


def _feed_forward(ff: Any, given: Tensor, height: int, width: int) -> Tensor:
    hidden = F.silu(F.linear(given, ff.conv_inverted.weight.flatten(1), ff.conv_inverted.bias))
    hidden = gated_conv(hidden, ff.conv_depth.weight, ff.conv_depth.bias, height, width)
    return F.linear(hidden, ff.conv_point.weight.flatten(1))


def is_plain(block: Any) -> bool:
    """Whether the block is Sana's own, with plain weights and no hook (offloading, casting) on any part, for a hook
    would never be called."""
    if type(block).__name__ != "SanaTransformerBlock" or getattr(block, "attn2", None) is None:
        return False
    # Sana's norms have no weights and FLUX's epsilon, which rows.py has as a literal.
    if any(norm.eps != EPS or norm.elementwise_affine for norm in (block.norm1, block.norm2)):
        return False
    if not still_plain(block) or block.ff.norm_type is not None or block.ff.residual_connection:
        return False
    if any(type(layer.weight) is not nn.Parameter for layer in _layers(block) if type(layer) is not Linear8):
        return False
    return not any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in block.modules())


def still_plain(block: Any) -> bool:
    """Whether this call may go through the fused block: adapters may have come since (LoRA), or another attention."""
    if type(block.attn1.processor).__name__ != "SanaLinearAttnProcessor2_0":
        return False
    # The cross attention is called whole, so whatever it is made of by now is all right.
    return all(type(layer) in (nn.Linear, nn.Conv2d, Linear8) for layer in _layers(block))


def _layers(block: Any) -> list[Any]:
    """The layers that are called by themselves."""
    attn, ff = block.attn1, block.ff
    return [attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], ff.conv_inverted, ff.conv_depth, ff.conv_point]
