"""Attention in 8 bits: q k^T in int8, P V in e4m3 or 16 bits, any length, head sizes 64 and 128.

Floor, for B 1, H 24, D 128, after `eight.prepare`: 4 N^2 H D products, 0.26 T at N = 4608, 132 us at an H200's
1979 T/s for 8 bits; the N^2 H exponentials take 137 us at 16 a clock on each of 132 multiprocessors, so the two must
overlap, and exponentials are read off a straight line (see attention8_triton.py).

P V is added up in float32 by itself after every block of keys, or every 32 of them by the Hopper kernel, because the
tensor cores keep only some 13 bits of an e4m3 sum. What does not cancel loses most: so V goes without its mean.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.chosen import Chosen, choose
from hasten.kernels.eight import BLOCK, Eight, prepare


def attention8(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, fp8: bool = True) -> Tensor:
    """softmax(q k^T scale) v, (B, H, N, D) of q's dtype; q, k, v of that shape, half precision, N at least 1.

    fp8: P and V in e4m3 (compute capability 8.9 and above), else in q's dtype. Differentiable it is not.
    """
    out: Tensor = torch.ops.hasten.attention8(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, fp8)
    return out.transpose(1, 2)


def attention8_sparse(
    q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor, alike: Tensor | None, skip_below: Tensor | None = None,
    topk: bool = True, text_rows: int = 0, scale: float | None = None, fp8: bool = True, order: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same over the blocks of keys that `chosen.choose` takes; keep, alike and skip_below (H,) float32 or None.

    order (N,) int32: blocks are of rows in this order, such as curve.token_order's; the result keeps the rows' own.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = torch.ops.hasten.attention8_sparse(
        q, k, v, keep, alike, skip_below, topk, text_rows, scale, fp8, order
    )
    return out.transpose(1, 2)


@torch.library.custom_op("hasten::attention8", mutates_args=())
def _attention8(q: Tensor, k: Tensor, v: Tensor, scale: float, fp8: bool) -> Tensor:
    q, k, v = (_dense(t) for t in (q, k, v))
    with on_device(q):
        return attend(prepare(q, k, v, scale=scale, fp8=fp8), v, q.dtype)


@torch.library.custom_op("hasten::attention8_sparse", mutates_args=())
def _attention8_sparse(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, alike: Tensor | None, skip_below: Tensor | None, topk: bool,
    text_rows: int, scale: float, fp8: bool, order: Tensor | None,
) -> Tensor:  # fmt: skip
    q, k, v = (_dense(t) for t in (q, k, v))
    with on_device(q):
        eight = prepare(q, k, v, scale=scale, fp8=fp8, means=True, alike=alike is not None, order=order)
        return attend_sparse(
            eight, v, q.dtype, keep=keep, alike=alike, skip_below=skip_below, topk=topk, text_rows=text_rows
        )


def _like(q: Tensor, *others: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3]))


_attention8.register_fake(_like)
_attention8_sparse.register_fake(_like)


def attend(eight: Eight, v: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax(q k^T) v by the fastest kernel here, (B, N, H, D) of `dtype`; v as in `attend_plain`."""
    fp8, device = eight.v is not None, eight.q.device
    if fp8 and eight.q.is_cuda and _hopper_works(device, eight.q.shape[2], dtype, eight.rows % BLOCK != 0):
        return attend_hopper(eight, dtype)
    return attend_plain(eight, v, dtype, tma=fp8 and _has_tma(device))


def attend_sparse(
    eight: Eight, v: Tensor, dtype: torch.dtype, *, keep: Tensor, alike: Tensor | None,
    skip_below: Tensor | None = None, topk: bool = True, text_rows: int = 0,
) -> Tensor:  # fmt: skip
    """The same over the blocks of keys that `choose` takes; eight: prepared with means, and likeness if it is asked."""
    chosen = choose(eight, keep=keep, alike=alike, topk=topk, text_rows=text_rows)
    return attend_chosen(eight, v, dtype, chosen=chosen, skip_below=skip_below)


def attend_chosen(
    eight: Eight, v: Tensor, dtype: torch.dtype, *, chosen: Chosen, skip_below: Tensor | None = None
) -> Tensor:
    """The same over blocks of keys that were chosen before; skip_below (H,): see `attend_plain`."""
    device, tail = eight.q.device, eight.rows % BLOCK != 0
    tma = eight.v is not None and skip_below is None and _has_tma(device)
    if tma and _hopper_works(device, eight.q.shape[2], dtype, tail, sparse=True):
        return attend_hopper(eight, dtype, chosen=chosen)
    return attend_plain(eight, v, dtype, chosen=chosen, skip_below=skip_below, tma=tma)


def attend_plain(
    eight: Eight, v: Tensor, dtype: torch.dtype, *, chosen: Chosen | None = None, skip_below: Tensor | None = None,
    rows: int = 64, keys: int = 128, warps: int = 4, stages: int = 2, tma: bool = False, lines: bool = True,
) -> Tensor:  # fmt: skip
    """softmax(q k^T) v by the plain kernel, (B, N, H, D) of `dtype`. v: (B, H, N, D), read where eight.v is None.

    chosen: the blocks of keys to attend to; skip_below (H,): see the kernel. lines: exponentials by the straight
    line between powers of two, within e4m3's own rounding.
    """
    assert chosen is None or keys == BLOCK
    assert eight.order is None or eight.v is not None
    dim = eight.q.shape[2]
    out = torch.empty((eight.batch, eight.rows, eight.heads, dim), device=eight.q.device, dtype=dtype)
    fp8 = eight.v is not None
    q8, k8, v8 = eight.q, eight.k, v if eight.v is None else eight.v
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        q8 = TensorDescriptor.from_tensor(q8.view(-1, dim), [rows, dim])
        k8 = TensorDescriptor.from_tensor(k8.view(-1, dim), [keys, dim])
        v8 = TensorDescriptor.from_tensor(v8.view(-1, eight.padded), [dim, keys])
    listed, count = (eight.q_scale, eight.q_scale) if chosen is None else (chosen.listed, chosen.count)
    _kernels().attend[((eight.rows + rows - 1) // rows, eight.batch * eight.heads)](
        q8, eight.q_scale, k8, eight.k_scale, v8,
        *((eight.v_scale, eight.v_mean) if fp8 else (eight.q_scale, eight.q_scale)), listed, count,
        eight.q_scale if skip_below is None else skip_below, eight.q_scale if eight.order is None else eight.order, out,
        v.stride(0), v.stride(1), v.stride(2), out.stride(0), out.stride(2), out.stride(1),
        eight.heads, eight.rows, eight.padded,
        D=dim, M=rows, N=keys, FP8=fp8, LINES=lines, TAIL=eight.rows % keys != 0, TMA=tma, SPARSE=chosen is not None,
        SKIP=skip_below is not None, STAGES=stages, ORDER=eight.order is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def attend_hopper(eight: Eight, dtype: torch.dtype, *, chosen: Chosen | None = None) -> Tensor:
    """The same in e4m3 by the Hopper kernel."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from hasten.kernels import attention8_hopper

    assert eight.v is not None
    dim, own, keys = eight.q.shape[2], 64, BLOCK
    device, order, q_scale = eight.q.device, eight.order, eight.q_scale
    options = attention8_hopper.DENSE if chosen is None else attention8_hopper.CHOSEN
    tile = options["GROUPS"] * own
    out = torch.empty((eight.batch, eight.rows, eight.heads, dim), device=device, dtype=dtype)
    flat = NVMMASharedLayout(swizzle_byte_width=dim, element_bitwidth=8, rank=2)
    turned = NVMMASharedLayout(swizzle_byte_width=keys, element_bitwidth=8, rank=2)
    row_blocks = (eight.rows + tile - 1) // tile
    key_blocks = eight.padded // keys
    tiles = row_blocks * eight.batch * eight.heads
    programs = _multiprocessors(device)
    rest = 0 if chosen is not None or order is not None else tiles % programs
    splits = _cuts(rest, programs, key_blocks)
    whole = tiles - rest if splits > 1 else tiles
    items = whole + (tiles - whole) * splits
    cut_rows = max(1, (items - whole) * tile)
    cut_out = torch.empty(cut_rows * (dim + 1), device=device, dtype=torch.float32)
    cut_lse = cut_out[cut_rows * dim :]
    at_out = (out.stride(0), out.stride(2), out.stride(1))
    attention8_hopper.attend[(min(items, programs),)](
        TensorDescriptor.from_tensor(eight.q.view(-1, dim), [own, dim], flat),
        TensorDescriptor.from_tensor(eight.k.view(-1, dim), [keys, dim], flat),
        TensorDescriptor.from_tensor(eight.v.view(-1, eight.padded), [dim, keys], turned),
        *((q_scale, q_scale) if chosen is None else (chosen.listed, chosen.count)),
        q_scale if order is None else order, q_scale, eight.k_scale, eight.v_scale, eight.q_length, eight.k_length,
        eight.v_mean, out, cut_out, cut_lse, *at_out,
        eight.heads, eight.rows, eight.padded, row_blocks, items, whole, splits, key_blocks,
        D=dim, M=own, N=keys, TAIL=eight.rows % keys != 0, SPARSE=chosen is not None, ORDER=order is not None,
        num_warps=4, **options,
    )  # fmt: skip
    if splits > 1:
        attention8_hopper.join_cut[(rest, tile // 32)](
            cut_out, cut_lse, out, *at_out, eight.heads, eight.rows, row_blocks, whole, splits,
            D=dim, TILE=tile, R=32, num_warps=4,
        )  # fmt: skip
    return out


def _cuts(rest: int, programs: int, key_blocks: int) -> int:
    """Into how many parts along the keys a last round's tiles are cut, so that all multiprocessors share them."""
    # In whole tiles: what the busiest one has to do, and about a twenty-fifth for each cut.
    return min(range(1, min(8, key_blocks) + 1), key=lambda cuts: -(-rest * cuts // programs) / cuts + 0.04 * cuts)


@functools.cache
def _hopper_works(device: torch.device, dim: int, dtype: torch.dtype, tail: bool, sparse: bool = False) -> bool:
    """Whether the Gluon kernel compiles here and agrees with the plain one; asked once for each of its compilations."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    # Long enough for every part of it: tiles cut along the keys, and sums carried over to shared memory.
    q, k, v = torch.randn(3, 1, 2, 4700 if tail else 4608, dim, device=device, dtype=dtype)
    eight = prepare(q, k, v, means=sparse)
    half = torch.full((2,), 0.5, device=device)
    chosen = choose(eight, keep=half, alike=None) if sparse else None
    try:
        found = attend_hopper(eight, q.dtype, chosen=chosen).float()
    except Exception as error:  # Gluon is experimental and has no common class for its refusals
        logging.getLogger("hasten").warning("the Hopper kernel cannot be used, the plain one is (%s)", _first(error))
        return False
    plain = attend_plain(eight, v, q.dtype, chosen=chosen, lines=False).float()
    # Lines against exact exponentials differ by some hundredths; a wrong result is off by 1.
    return bool((found - plain).abs().mean() < 0.1 * plain.abs().mean())


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@functools.cache
def _has_tma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def _dense(t: Tensor) -> Tensor:
    """t itself where its rows are dense and its strides keep the vectors' 16 bytes, else a copy."""
    fits = t.stride(-1) == 1 and all(s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
    return t if fits else t.contiguous()


def on_device(q: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _kernels() -> Any:
    from hasten.kernels import attention8_triton

    return attention8_triton
