"""Element-wise work of a FLUX block, each piece one pass over its rows, as operations that torch.compile sees through.

norm + modulate + largest value + cast; the same with the gated residual before it; gelu beside the attention's output;
query and key norm + rotation. Rows of two streams go through one launch: text first, then image. Their order in what
comes out is either "joint" (one sequence, batch after batch) or "apart" (all text rows, then all image rows), so that
each stream's linear layers see one matrix.

Floor: every tensor once in and once out. For FLUX.1-dev at 1024x1024 a stream of 4608 x 3072 in 16 bits is 28.3 MB,
6.6 us at 4.27 TB/s. Without Triton, or off the GPU, the same arithmetic is done by torch in float32.

Every norm of FLUX has an epsilon of 1e-6. It stands as a literal below: a default or a module's attribute is a number
that the compiler leaves open at first, and for which it then compiles the graph a second time.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.operation import operation

FP8 = torch.float8_e4m3fn
LIMITS = {FP8: 448.0, torch.int8: 127.0}


@functools.cache
def triton_kernels() -> Any:
    """The module of Triton kernels, or None where Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        return None
    from hasten.kernels import rows_triton

    return rows_triton


def quantise(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of (R, C) as `dtype` and their scales (R, 1) in float32: values = rows * scales.

    The scale is a row's largest size over the dtype's largest number. NaN and infinity make their row NaN.
    """
    values = values.float()
    largest = values.abs().amax(-1, keepdim=True)
    scales = largest.clamp(min=1e-12) / LIMITS[dtype]
    if dtype == torch.int8:
        return (values / scales).nan_to_num(0.0).round().clamp(-128, 127).to(dtype), scales
    return (values / scales).to(dtype), scales


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


def gelu_beside(before: Tensor | None, hidden: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """[before, gelu(hidden)] row by row, (R, C + M), and its scales; gelu in its tanh form.

    before (R, C) or None, hidden (R, M); rows may lie apart. dtype as in norm_modulate.
    """
    out: tuple[Tensor, Tensor] = torch.ops.hasten.gelu_beside(before, hidden, dtype or hidden.dtype)
    return out


def split_streams(joint: Tensor, length: int, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Rows of (B, S, C), the first `length` of each sequence being text: all text rows, then all image rows."""
    out: tuple[Tensor, Tensor] = torch.ops.hasten.split_streams(joint, length, dtype or joint.dtype)
    return out


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
        values = torch.cat(_streams(values, batch, length, joint=False), 1).flatten(0, 1)
    found: Tensor = values.unflatten(0, (batch, -1)).unflatten(-1, (heads, width))
    return found


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _use_triton(x: Tensor) -> bool:
    return x.is_cuda and triton_kernels() is not None


def _empty_rows(x: Tensor, count: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for rows and for their scales; rows that are not quantised have none."""
    scales = (count, 1) if dtype in LIMITS else (0, 1)
    return x.new_empty((count, width), dtype=dtype), x.new_empty(scales, dtype=torch.float32)


def _arranged(text: Tensor, image: Tensor, joint: bool) -> Tensor:
    """Rows (B * (L + N), C) of two streams."""
    if joint:
        return torch.cat([text, image], 1).flatten(0, 1)
    return torch.cat([text.flatten(0, 1), image.flatten(0, 1)])


def _streams(rows: Tensor, batch: int, length: int, joint: bool) -> tuple[Tensor, Tensor]:
    """The inverse of _arranged."""
    total, width = rows.shape[0] // batch, rows.shape[1]
    if joint:
        both = rows.view(batch, total, width)
        return both[:, :length], both[:, length:]
    text, image = rows[: batch * length], rows[batch * length :]
    return text.view(batch, length, width), image.view(batch, total - length, width)


def streams_of(qkv: Tensor, inner: int, batch: int, length: int, joint: bool) -> tuple[Tensor, Tensor]:
    """Text's and image's queries, keys and values, (B, L, 3 * inner) and (B, N, 3 * inner), as views of such rows."""
    return _streams(qkv[:, : 3 * inner], batch, length, joint)


def _finish(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dtype in LIMITS:
        return quantise(values, dtype)
    return values.to(dtype), values.new_empty((0, 1), dtype=torch.float32)


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
    text, image = _dense_last(text), _dense_last(image)
    update = image if update is None else _dense_last(update)
    batch, length, width = text.shape
    tokens = image.shape[1]
    text_out, image_out = out or (text, image)
    values, scales = normed or (image, image)
    # On an H200 in fp8, us with a row for each program of 8 warps, and with 8 programs of 4 warps on a multiprocessor:
    # norm 72 and 62, with the sum before it 104 and 70, the sum alone 80 and 52 (from memory, with the launch).
    most = 8 * _multiprocessors(image.device) if image.is_cuda else length + tokens
    parts = 3 if 3 * _power_of_two(-(-width // 3)) < _power_of_two(width) else 1
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
        BLOCK=_power_of_two(-(-width // parts)),
        PARTS=parts,
        STAGES=stages,
        num_warps=warps,
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


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
    return _empty_rows(image, text.shape[0] * (text.shape[1] + image.shape[1]), image.shape[2], dtype)


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
    if _use_triton(image):
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
    return _finish(_arranged(*streams, joint), dtype)


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
    rows, scales = _empty_rows(image, count, image.shape[2], dtype)
    _launch_residual_norm(
        text,
        image,
        None,
        _dense_last(text_mods),
        _dense_last(image_mods),
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
    rows, scales = _empty_rows(image, update.shape[0], image.shape[2], dtype)
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
    if _use_triton(image):
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
    text_update, image_update = _streams(update, text.shape[0], text.shape[1], joint=False)
    text, image = _added(text, text_update, text_mods, gate), _added(image, image_update, image_mods, gate)
    normed = _normed(text, text_mods, shift, scale, eps), _normed(image, image_mods, shift, scale, eps)
    return text, image, *_finish(_arranged(*normed, joint=False), dtype)


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
    rows, scales = _empty_rows(image, update.shape[0], image.shape[2], dtype)
    out = text.new_empty(text.shape), image.new_empty(image.shape)
    _launch_residual_norm(
        text,
        image,
        update,
        _dense_last(text_mods),
        _dense_last(image_mods),
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
    if _use_triton(image):
        return add_gated_by_triton(text, image, update, text_mods, image_mods, gate, joint)
    return add_gated_by_torch(text, image, update, text_mods, image_mods, gate, joint)


def add_gated_by_torch(
    text: Tensor, image: Tensor, update: Tensor, text_mods: Tensor, image_mods: Tensor, gate: int, joint: bool
) -> tuple[Tensor, Tensor]:
    """add_gated by torch's own operations."""
    text_update, image_update = _streams(update, text.shape[0], text.shape[1], joint)
    return _added(text, text_update, text_mods, gate), _added(image, image_update, image_mods, gate)


def add_gated_by_triton(
    text: Tensor, image: Tensor, update: Tensor, text_mods: Tensor, image_mods: Tensor, gate: int, joint: bool
) -> tuple[Tensor, Tensor]:
    """add_gated by its kernel; also the interpreter's way in."""
    out = text.new_empty(text.shape), image.new_empty(image.shape)
    mods = _dense_last(text_mods), _dense_last(image_mods)
    _launch_residual_norm(text, image, update, *mods, out, None, joint=joint, gate=gate)
    return out


def _gelu_beside_shapes(before: Tensor | None, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    width = hidden.shape[1] + (0 if before is None else before.shape[1])
    return _empty_rows(hidden, hidden.shape[0], width, dtype)


@operation("gelu_beside", shapes=_gelu_beside_shapes)
def _gelu_beside(before: Tensor | None, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if _use_triton(hidden):
        return gelu_beside_by_triton(before, hidden, dtype)
    return gelu_beside_by_torch(before, hidden, dtype)


def gelu_beside_by_torch(before: Tensor | None, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """gelu_beside by torch's own operations."""
    values = torch.nn.functional.gelu(hidden.float(), approximate="tanh")
    return _finish(values if before is None else torch.cat([before.float(), values], -1), dtype)


def gelu_beside_by_triton(
    before: Tensor | None,
    hidden: Tensor,
    dtype: torch.dtype,
    *,
    warps: int = 0,
    parts: int = 0,
    programs: int = 0,
    stages: int = 0,
    fast: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """gelu_beside by its kernel; also the interpreter's way in. warps, parts, programs, stages: 0 for what was fastest.

    programs: that take the rows in turns; stages: 2 or more to have the next rows fetched meanwhile.

    fast: the GPU's own tanh, for rows in 8 bits on NVIDIA GPUs if left out.
    """
    module = triton_kernels()
    hidden = _dense_last(hidden)
    head = hidden if before is None else _dense_last(before)
    head_width = 0 if before is None else head.shape[1]
    count, width = hidden.shape
    rows, scales = _empty_rows(hidden, count, head_width + width, dtype)
    parts = parts or _parts(width)
    block = _power_of_two(-(-width // parts))
    warps = warps or max(4, min(8, block // 256))
    own = hidden.is_cuda and torch.version.cuda is not None
    # 12288 channels in fp8 on an H200, us beside 3072 others and alone: a row for each program 132 and 82; two programs
    # on each multiprocessor that fetch two rows ahead 102 and 64, one row ahead 113 and 75.
    programs = programs or min(count, 2 * _multiprocessors(hidden.device) if own else count)
    stages = stages or (3 if own and block <= 4096 else 1)
    if count:
        module.launch(
            module.gelu_row,
            (programs,),
            *(head, hidden, rows, scales, count, head.stride(0), hidden.stride(0)),
            BEFORE_WIDTH=head_width,
            WIDTH=width,
            BEFORE=before is not None,
            QUANTISES=dtype in LIMITS,
            BLOCK_BEFORE=_power_of_two(max(head_width, 1)),
            BLOCK=block,
            PARTS=parts,
            STAGES=stages,
            FAST=own and dtype in LIMITS if fast is None else fast,
            num_warps=warps,
        )
    return rows, scales


def _parts(width: int) -> int:
    """Into how many blocks of a power of two, 1, 3 or 4, a row goes with the fewest columns beyond its end."""
    return min((1, 3, 4), key=lambda n: (n * _power_of_two(-(-width // n)), n))


def _split_streams_shapes(joint: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _empty_rows(joint, joint.shape[0] * joint.shape[1], joint.shape[2], dtype)


@operation("split_streams", shapes=_split_streams_shapes)
def _split_streams(joint: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if _use_triton(joint):
        return split_streams_by_triton(joint, length, dtype)
    return split_streams_by_torch(joint, length, dtype)


def split_streams_by_torch(joint: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """split_streams by torch's own operations."""
    return _finish(_arranged(joint[:, :length].float(), joint[:, length:].float(), joint=False), dtype)


def split_streams_by_triton(joint: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """split_streams by its kernel; also the interpreter's way in."""
    module = triton_kernels()
    joint = _dense_last(joint)
    batch, total, width = joint.shape
    rows, scales = _empty_rows(joint, batch * total, width, dtype)
    if batch * total:
        module.launch(
            module.split_row,
            (total, batch),
            *(joint, rows, scales, length, total - length, batch, width, joint.stride(0), joint.stride(1)),
            QUANTISES=dtype in LIMITS,
            BLOCK=_power_of_two(width),
            num_warps=8,
        )
    return rows, scales


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
    if _use_triton(qkv):
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
    text, image = _streams(qkv[:, : 3 * inner], batch, length, joint)
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
    qkv = _dense_last(qkv)
    total, width = qkv.shape[0] // batch, weights[0].shape[0]
    q, k = (qkv.new_empty((batch, total, heads, width)) for _ in range(2))
    if total:
        module.launch(
            module.norm_rope,
            (total, batch, 2),
            *(qkv, *weights, cos, sin, q, k, length, total - length, batch, heads, qkv.stride(0)),
            *(cos.stride(0), cos.stride(1), sin.stride(0), sin.stride(1), eps),
            JOINT=joint,
            HEADS=_power_of_two(heads),
            HALF=width // 2,
            num_warps=4,
        )
    return q, k
