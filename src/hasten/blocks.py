"""FLUX's double and single block as a few passes: fused element-wise work from kernels.rows between matrix products.

It knows streams, layers and modulation, and neither a framework nor where the layers hang: a host hands over the
`Double` and `Single` that it found. Attention is the host's too. Numbers differ from the unfused blocks by rounding
alone, for norms, rotation, gelu and gates stay in float32 between reading a row and writing it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hasten.kernels import linear, rows
from hasten.kernels.modulation import modulation
from hasten.quantize import Linear8

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, L + N, H, D) three times to the same shape
AttendRows = Callable[..., Tensor]  # what rows.norm_rope takes, to what Attend gives
Rope = tuple[Tensor, Tensor]  # cosines and sines, (L + N, D / 2)


class Part(NamedTuple):
    """A layer, or some of its outputs: several layers of one family are one layer in another's checkpoints."""

    layer: nn.Linear
    begin: int = 0
    end: int | None = None


Layers = Sequence[Part]

EPS = 1e-6  # of every norm of FLUX, as rows.py has it


class Stream(NamedTuple):
    """One stream's parts of a double block; q_norm, k_norm: RMSNorm weights (D)."""

    mods: nn.Linear
    qkv: Layers
    q_norm: Tensor
    k_norm: Tensor
    out: Layers
    up: Layers
    down: Layers


class Double(NamedTuple):
    """A double block."""

    text: Stream
    image: Stream
    heads: int


class Single(NamedTuple):
    """A single block: qkv and up lie over the same rows, down over [attention, gelu(up)]."""

    mods: nn.Linear
    qkv: Layers
    q_norm: Tensor
    k_norm: Tensor
    up: Layers
    down: Layers
    heads: int


def double(
    block: Double, text: Tensor, image: Tensor, vector: Tensor, rope: Rope, attend: Attend,
    attend_rows: AttendRows | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Text (B, L, C) and image (B, N, C) after a double block; vector (B, C): the time's and prompt's, before silu.

    attend_rows: an attention that norms and rotates by itself, taken instead of `attend`.
    """
    of_text, of_image = block.text, block.image
    batch, length, _ = text.shape
    split = batch * length
    # Six parts of C each: shift, scale, gate around attention, then around the two wide layers.
    mods = _modulations(vector, of_text.mods, of_image.mods)
    bits = _row_dtype(of_image.qkv)
    given = rows.norm_modulate(text, image, *mods, shift=0, scale=1, joint=False, dtype=bits)
    qkv = _linear(given, split, of_text.qkv, of_image.qkv, image.dtype)
    norms = of_text.q_norm, of_text.k_norm, of_image.q_norm, of_image.k_norm
    attended = _attended(qkv, norms, rope, attend, attend_rows, (batch, length, block.heads, False))
    given = rows.split_streams(attended.flatten(2), length, dtype=_row_dtype(of_image.out))
    update = _linear(given, split, of_text.out, of_image.out, image.dtype)
    bits = _row_dtype(of_image.up)
    text, image, values, scales = rows.add_norm_modulate(
        text, image, update, *mods, gate=2, shift=3, scale=4, dtype=bits
    )
    # In 16 bits gelu is the product's own last step; in 8 it must know the whole row before the cast.
    hidden = _linear((values, scales), split, of_text.up, of_image.up, image.dtype, gelu=bits is None)
    given = (hidden, scales) if bits is None else rows.gelu_beside(None, hidden, dtype=bits)
    update = _linear(given, split, of_text.down, of_image.down, image.dtype)
    return rows.add_gated(text, image, update, *mods, gate=5, joint=False)


def single(
    block: Single, text: Tensor, image: Tensor, vector: Tensor, rope: Rope, attend: Attend,
    attend_rows: AttendRows | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Text (B, L, C) and image (B, N, C) after a single block; vector (B, C): the time's and prompt's, before silu."""
    batch, length, _ = text.shape
    (mods,) = _modulations(vector, block.mods)
    bits = _row_dtype(block.down)
    given = rows.norm_modulate(text, image, mods, mods, shift=0, scale=1, joint=True, dtype=bits)
    wide = _linear(given, 0, (), block.qkv if bits is None else (*block.qkv, *block.up), image.dtype)
    norms = block.q_norm, block.k_norm, block.q_norm, block.k_norm
    attended = _attended(wide, norms, rope, attend, attend_rows, (batch, length, block.heads, True))
    attended = attended.flatten(2).flatten(0, 1)
    if bits is None:
        hidden = _linear(given, 0, (), block.up, image.dtype, gelu=True)
        weight, bias = _tensors(block.down[0])
        update = linear.linear_beside(attended, hidden, weight, bias)
    else:
        given = rows.gelu_beside(attended, wide[:, 3 * attended.shape[1] :], dtype=bits)
        update = _linear(given, 0, (), block.down, image.dtype)
    return rows.add_gated(text, image, update, mods, mods, gate=2, joint=True)


def _modulations(vector: Tensor, *layers: nn.Linear) -> Sequence[Tensor]:
    """What each layer makes of silu(vector), (B, O)."""
    if any(type(layer) is not nn.Linear for layer in layers):
        given = nn.functional.silu(vector)
        return [layer(given) for layer in layers]
    return modulation(vector, [(layer.weight, layer.bias) for layer in layers]).unbind()


def _attended(
    qkv: Tensor, norms: tuple[Tensor, Tensor, Tensor, Tensor], rope: Rope, attend: Attend,
    attend_rows: AttendRows | None, shape: tuple[int, int, int, bool],
) -> Tensor:  # fmt: skip
    batch, length, heads, joint = shape
    if attend_rows is not None:
        return attend_rows(qkv, norms, rope, batch=batch, length=length, heads=heads, joint=joint)
    return attend(*rows.norm_rope(qkv, norms, rope, batch=batch, length=length, heads=heads, joint=joint))


def _row_dtype(layers: Layers) -> torch.dtype | None:
    """What a layer wants its rows in: float8 or int8, or None for the model's own dtype."""
    layer = layers[0].layer
    return layer.weight8.dtype if isinstance(layer, Linear8) else None


def _tensors(part: Part) -> tuple[Tensor, ...]:
    """Weight (its scales) and bias of a layer's outputs."""
    layer = part.layer
    found = layer.tensors() if isinstance(layer, Linear8) else (layer.weight, layer.bias)
    if part.begin == 0 and part.end is None:
        return found
    return tuple(tensor[part.begin : part.end] for tensor in found)


def _linear(
    given: tuple[Tensor, Tensor], split: int, text: Layers, image: Layers, dtype: torch.dtype, *, gelu: bool = False
) -> Tensor:
    """Rows, and their scales where they have any, through layers side by side."""
    values, scales = given
    of_text, of_image = [_tensors(part) for part in text], [_tensors(part) for part in image]
    if _row_dtype(image) is None:
        return linear.linear_rows(values, split, of_text, of_image, gelu=gelu)
    return linear.linear_rows_8(values, scales, split, of_text, of_image, dtype)
