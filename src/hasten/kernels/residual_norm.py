"""Gated residual, LayerNorm, modulation and 8 bits in one pass over the rows of two streams; see rows.py."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.kernels.operation import operation
from hasten.kernels.row_parts import (
    LIMITS,
    arranged,
    dense_last,
    empty_rows,
    finished,
    multiprocessors,
    power_of_two,
    streams_apart,
    triton_kernels,
    use_triton,
)


def norm_modulate(
    text: Tensor,
    image: Tensor,
    text_mods: Tensor,
    image_mods: Tensor,
    *,
    shift: int,
    scale: int,
    joint: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm(x) * (1 + scale) + shift of both streams: rows (B * (L + N), C) and their scales (rows, 1).

    text (B, L, C), image (B, N, C); mods (B, k * C), of which `shift` and `scale` name the parts. dtype: float8 or int8
    to quantise each row by its own scale, None for the streams' dtype; the scales are empty then.
    """
    out: tuple[Tensor, Tensor] = torch.ops.hasten.norm_modulate(
        text, image, text_mods, image_mods, shift, scale, joint, 1e-6, dtype or image.dtype
    )
    return out


def add_norm_modulate(
    text: Tensor,
    image: Tensor,
    update: Tensor,
    text_mods: Tensor,
    image_mods: Tensor,
    *,
    gate: int,
    shift: int,
    scale: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both streams with gate * update added, then normed and modulated as in norm_modulate, streams apart.

    update (B * (L + N), C): all text rows, then all image rows. Gives text, image, rows, scales.
    """
    out: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.hasten.add_norm_modulate(
        text, image, update, text_mods, image_mods, gate, shift, scale, 1e-6, dtype or image.dtype
    )
    return out


def add_gated(
    text: Tensor, image: Tensor, update: Tensor, text_mods: Tensor, image_mods: Tensor, *, gate: int, joint: bool
) -> tuple[Tensor, Tensor]:
    """Both streams with gate * update added; update's rows (B * (L + N), C) are joint or apart."""
    out: tuple[Tensor, Tensor] = torch.ops.hasten.add_gated(text, image, update, text_mods, image_mods, gate, joint)
    return out


def _part(mods: Tensor, index: int, width: int) -> Tensor:
    return mods[:, None, index * width : (index + 1) * width].float()


def _normed(x: Tensor, mods: Tensor, shift: int, scale: int, eps: float) -> Tensor:
    width = x.shape[-1]
    normed = torch.nn.functional.layer_norm(x.float(), (width,), eps=eps)
    return normed * (1 + _part(mods, scale, width)) + _part(mods, shift, width)


def _added(x: Tensor, update: Tensor, mods: Tensor, gate: int) -> Tensor:
    return (x.float() + _part(mods, gate, x.shape[-1]) * update.float()).to(x.dtype)


def _launch_residual_norm(
    text: Tensor,
    image: Tensor,
    update: Tensor | None,
    text_mods: Tensor,
    image_mods: Tensor,
    out: tuple[Tensor, Tensor] | None,
    normed: tuple[Tensor, Tensor] | None,
    *,
    joint: bool,
    gate: int = 0,
    shift: int = 0,
    scale: int = 0,
    eps: float = 1e-6,
    programs: int = 0,
    stages: int = 1,
    warps: int = 4,
) -> None:
    module = triton_kernels()
    text, image = dense_last(text), dense_last(image)
    update = image if update is None else dense_last(update)
    batch, length, width = text.shape
    tokens = image.shape[1]
    text_out, image_out = out or (text, image)
    values, scales = normed or (image, image)
    # On an H200 in fp8, us with a row for each program of 8 warps, and with 8 programs of 4 warps on a multiprocessor:
    # norm 72 and 62, with the sum before it 104 and 70, the sum alone 80 and 52 (from memory, with the launch).
    most = 8 * multiprocessors(image.device) if image.is_cuda else length + tokens
    parts = 3 if 3 * power_of_two(-(-width // 3)) < power_of_two(width) else 1
    grid = (programs or min(length + tokens, most), batch)
    if grid[0] * batch == 0:
        return
    module.launch(
        module.residual_norm,
        grid,
        *(text, image, update, text_mods, image_mods, text_out, image_out, values, scales),
        *(length, tokens, batch),
        *(text.stride(0), text.stride(1), image.stride(0), image.stride(1), update.stride(0)),
        *(text_mods.stride(0), image_mods.stride(0), text_out.stride(0), image_out.stride(0), eps),
        WIDTH=width,
        GATE=gate,
        SHIFT=shift,
        SCALE=scale,
        UPDATES=out is not None,
        NORMS=normed is not None,
        QUANTISES=normed is not None and normed[0].dtype in LIMITS,
        JOINT=joint,
        BLOCK=power_of_two(-(-width // parts)),
        PARTS=parts,
        STAGES=stages,
        num_warps=warps,
    )


def _norm_modulate_shapes(
    text: Tensor,
    image: Tensor,
    text_mods: Tensor,
    image_mods: Tensor,
    shift: int,
    scale: int,
    joint: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return empty_rows(image, text.shape[0] * (text.shape[1] + image.shape[1]), image.shape[2], dtype)


@operation("norm_modulate", shapes=_norm_modulate_shapes)
def _norm_modulate(
    text: Tensor,
    image: Tensor,
    text_mods: Tensor,
    image_mods: Tensor,
    shift: int,
    scale: int,
    joint: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if use_triton(image):
        return norm_modulate_by_triton(text, image, text_mods, image_mods, shift, scale, joint, eps, dtype)
    return norm_modulate_by_torch(text, image, text_mods, image_mods, shift, scale, joint, eps, dtype)


def norm_modulate_by_torch(
    text: Tensor,
    image: Tensor,
    text_mods: Tensor,
    image_mods: Tensor,
    shift: int,
    scale: int,
    joint: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """norm_modulate by torch's own operations."""
    streams = _normed(text, text_mods, shift, scale, eps), _normed(image, image_mods, shift, scale, eps)
    return finished(arranged(*streams, joint), dtype)


def norm_modulate_by_triton(
    text: Tensor,
    image: Tensor,
    text_mods: Tensor,
    image_mods: Tensor,
    shift: int,
    scale: int,
    joint: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """norm_modulate by its kernel; also the interpreter's way in."""
    count = text.shape[0] * (text.shape[1] + image.shape[1])
    rows, scales = empty_rows(image, count, image.shape[2], dtype)
    _launch_residual_norm(
        text,
        image,
        None,
        dense_last(text_mods),
        dense_last(image_mods),
        None,
        (rows, scales),
        joint=joint,
        shift=shift,
        scale=scale,
        eps=eps,
    )
    return rows, scales


def _add_norm_modulate_shapes(
    text: Tensor,
    image: Tensor,
    update: Tensor,
    text_mods: Tensor,
    image_mods: Tensor,
    gate: int,
    shift: int,
    scale: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, scales = empty_rows(image, update.shape[0], image.shape[2], dtype)
    return text.new_empty(text.shape), image.new_empty(image.shape), rows, scales


@operation("add_norm_modulate", shapes=_add_norm_modulate_shapes)
def _add_norm_modulate(
    text: Tensor,
    image: Tensor,
    update: Tensor,
    text_mods: Tensor,
    image_mods: Tensor,
    gate: int,
    shift: int,
    scale: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if use_triton(image):
        return add_norm_modulate_by_triton(text, image, update, text_mods, image_mods, gate, shift, scale, eps, dtype)
    return add_norm_modulate_by_torch(text, image, update, text_mods, image_mods, gate, shift, scale, eps, dtype)


def add_norm_modulate_by_torch(
    text: Tensor,
    image: Tensor,
    update: Tensor,
    text_mods: Tensor,
    image_mods: Tensor,
    gate: int,
    shift: int,
    scale: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """add_norm_modulate by torch's own operations."""
    text_update, image_update = streams_apart(update, text.shape[0], text.shape[1], joint=False)
    text, image = _added(text, text_update, text_mods, gate), _added(image, image_update, image_mods, gate)
    normed = _normed(text, text_mods, shift, scale, eps), _normed(image, image_mods, shift, scale, eps)
    return text, image, *finished(arranged(*normed, joint=False), dtype)


def add_norm_modulate_by_triton(
    text: Tensor,
    image: Tensor,
    update: Tensor,
    text_mods: Tensor,
    image_mods: Tensor,
    gate: int,
    shift: int,
    scale: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """add_norm_modulate by its kernel; also the interpreter's way in."""
    rows, scales = empty_rows(image, update.shape[0], image.shape[2], dtype)
    out = text.new_empty(text.shape), image.new_empty(image.shape)
    _launch_residual_norm(
        text,
        image,
        update,
        dense_last(text_mods),
        dense_last(image_mods),
        out,
        (rows, scales),
        joint=False,
        gate=gate,
        shift=shift,
        scale=scale,
        eps=eps,
    )
    return *out, rows, scales


def _add_gated_shapes(
    text: Tensor, image: Tensor, update: Tensor, text_mods: Tensor, image_mods: Tensor, gate: int, joint: bool
) -> tuple[Tensor, Tensor]:
    return text.new_empty(text.shape), image.new_empty(image.shape)


@operation("add_gated", shapes=_add_gated_shapes)
def _add_gated(
    text: Tensor, image: Tensor, update: Tensor, text_mods: Tensor, image_mods: Tensor, gate: int, joint: bool
) -> tuple[Tensor, Tensor]:
    if use_triton(image):
        return add_gated_by_triton(text, image, update, text_mods, image_mods, gate, joint)
    return add_gated_by_torch(text, image, update, text_mods, image_mods, gate, joint)


def add_gated_by_torch(
    text: Tensor, image: Tensor, update: Tensor, text_mods: Tensor, image_mods: Tensor, gate: int, joint: bool
) -> tuple[Tensor, Tensor]:
    """add_gated by torch's own operations."""
    text_update, image_update = streams_apart(update, text.shape[0], text.shape[1], joint)
    return _added(text, text_update, text_mods, gate), _added(image, image_update, image_mods, gate)


def add_gated_by_triton(
    text: Tensor, image: Tensor, update: Tensor, text_mods: Tensor, image_mods: Tensor, gate: int, joint: bool
) -> tuple[Tensor, Tensor]:
    """add_gated by its kernel; also the interpreter's way in."""
    out = text.new_empty(text.shape), image.new_empty(image.shape)
    mods = dense_last(text_mods), dense_last(image_mods)
    _launch_residual_norm(text, image, update, *mods, out, None, joint=joint, gate=gate)
    return out
