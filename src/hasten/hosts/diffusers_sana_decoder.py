"""diffusers_sana_decoder.py: DC-AE's decoder in fused passes, its channels last throughout.

What lies between two convolutions is one pass; the 1x1 convolutions are products of rows, those of 32 channels each one
batched product; attention and gated convolution are Sana's own kernels. Nothing is compiled: a decoder of six widths
would be a dozen graphs. Numbers differ from diffusers' own by rounding alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.hosts.diffusers_hooks import hooked
from hasten.kernels.decoder import norm_add, spread
from hasten.kernels.gated_conv import gated_conv
from hasten.kernels.linear_attention import linear_attention


class FusedPart(nn.Module):
    """Stands for one part of the decoder. Where gradients are asked for, or it was altered, the part itself runs."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        """What the part gives."""
        if torch.is_grad_enabled() or not is_plain(self.part):
            return self.part._call_impl(x)  # type: ignore[no-any-return]
        return PARTS[type(self.part).__name__](self.part, x)


def is_plain(part: Any) -> bool:
    """Whether it is diffusers' own, with plain weights and no hook on any piece."""
    kind = type(part).__name__
    if kind not in PARTS:
        return False
    for piece in part.modules():
        if hooked(piece):
            return False
        if any(type(weight) is not nn.Parameter for weight in piece._parameters.values() if weight is not None):
            return False
    fits: bool = FITS[kind](part)
    return fits


def pixels_of(x: Tensor) -> Tensor:
    """(B, H, W, C) of (B, C, H, W): no copy where channels lie last."""
    return x.permute(0, 2, 3, 1).contiguous()


def picture_of(pixels: Tensor) -> Tensor:
    """(B, C, H, W) of (B, H, W, C), where it lies."""
    return pixels.permute(0, 3, 1, 2)


def _normed(norm: Any, pixels: Tensor, residual: Tensor | None) -> Tensor:
    return norm_add(pixels, norm.weight, norm.bias, residual, norm.eps)


def _residual(block: Any, x: Tensor) -> Tensor:
    hidden = block.conv2(F.silu(block.conv1(x), inplace=True))
    return picture_of(_normed(block.norm, pixels_of(hidden), pixels_of(x)))


def _vit(block: Any, x: Tensor) -> Tensor:
    if x.shape[2] * x.shape[3] <= block.attn.attention_head_dim:
        return block._call_impl(x)  # type: ignore[no-any-return]
    pixels = pixels_of(x)
    pixels = _normed(block.attn.norm_out, _attention(block.attn, pixels), pixels)
    return picture_of(_normed(block.conv_out.norm, _feed_forward(block.conv_out, pixels), pixels))


def _attention(attn: Any, pixels: Tensor) -> Tensor:
    """Before its norm, (B, H, W, C)."""
    batch, height, width, _ = pixels.shape
    qkv = F.linear(pixels, torch.cat([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight]))
    scales = [qkv]
    for scale in attn.to_qkv_multiscale:
        near = pixels_of(scale.proj_in(picture_of(qkv)))
        groups = scale.proj_out.groups
        rows = near.view(batch * height * width, groups, -1).transpose(0, 1)
        mixed = rows @ scale.proj_out.weight.view(groups, -1, rows.shape[-1]).transpose(1, 2)
        scales.append(mixed.transpose(0, 1).reshape(qkv.shape))
    # A head's queries, keys and values lie beside each other.
    heads = torch.cat(scales, dim=-1).view(batch, height * width, -1, 3, attn.attention_head_dim)
    q, k, v = (heads[:, :, :, i].flatten(2) for i in range(3))
    out: Tensor = F.linear(linear_attention(q, k, v, heads.shape[2]), attn.to_out.weight)
    return out.view(batch, height, width, -1)


def _feed_forward(ff: Any, pixels: Tensor) -> Tensor:
    """Before its norm, (B, H, W, C)."""
    height, width = pixels.shape[1:3]
    hidden = F.silu(F.linear(pixels.flatten(1, 2), ff.conv_inverted.weight.flatten(1), ff.conv_inverted.bias))
    hidden = gated_conv(hidden, ff.conv_depth.weight, ff.conv_depth.bias, height, width)
    out: Tensor = F.linear(hidden, ff.conv_point.weight.flatten(1))
    return out.view(len(pixels), height, width, -1)


def _up(block: Any, x: Tensor) -> Tensor:
    pixels = pixels_of(x)
    if block.interpolate:
        out = block.conv(picture_of(spread(pixels, 4, None)))
    else:
        out = F.pixel_shuffle(block.conv(x), block.factor)
    return picture_of(spread(pixels, block.repeats, pixels_of(out))) if block.shortcut else out


def _norm(norm: Any, x: Tensor) -> Tensor:
    return _normed(norm, x, None)


def _is_rms(norm: Any) -> bool:
    return type(norm).__name__ == "RMSNorm" and norm.weight is not None and norm.bias is not None


def _fits_vit(block: Any) -> bool:
    attn, ff = block.attn, block.conv_out
    return (
        type(attn.processor).__name__ == "SanaMultiscaleAttnProcessor2_0"
        and attn.residual_connection
        and ff.residual_connection
        and _is_rms(attn.norm_out)
        and _is_rms(ff.norm)
        and attn.eps == 1e-15  # the kernel's
    )


PARTS = {"ResBlock": _residual, "EfficientViTBlock": _vit, "DCUpBlock2d": _up, "RMSNorm": _norm}
FITS: dict[str, Any] = {
    "ResBlock": lambda block: type(block.nonlinearity) is nn.SiLU and _is_rms(block.norm),
    "EfficientViTBlock": _fits_vit,
    "DCUpBlock2d": lambda block: (
        block.factor == 2
        and block.interpolation_mode == "nearest"
        and block.repeats * block.conv.in_channels == 4 * block.conv.out_channels // (1 if block.interpolate else 4)
    ),
    "RMSNorm": _is_rms,
}
