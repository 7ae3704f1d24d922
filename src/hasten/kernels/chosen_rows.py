"""The chosen tokens on their way into the MLP: gathered, the attention added, normed and modulated, in one kernel.

In torch these are five; with 57 blocks a partial evaluation is short enough for launches to count.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm


def chosen_rows(
    x: Tensor, index: Tensor, scale: Tensor, shift: Tensor, *, eps: float, gate: Tensor | None = None,
    a: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(1 + scale) * norm(x + gate * a) + shift of the chosen rows, (B, k, C): LayerNorm without weights of its own.

    x, a: (B, N, C), contiguous. index: (B * k,) rows of x flattened to (B * N, C), sample by sample. scale, shift,
    gate: (B, 1, C) or (1, 1, C).
    """
    if x.is_cuda and not torch.compiler.is_compiling():
        at_once: Tensor = _on_cuda(x, index, scale, shift, eps, gate, a)  # a dispatch costs as much as a launch
        return at_once
    rows: Tensor = torch.ops.hasten.chosen_rows(x, index, scale, shift, eps, gate, a)
    return rows


@torch.library.custom_op("hasten::chosen_rows", mutates_args=())
def _chosen_rows(
    x: Tensor, index: Tensor, scale: Tensor, shift: Tensor, eps: float, gate: Tensor | None, a: Tensor | None
) -> Tensor:
    batch, _, width = x.shape
    rows = x.reshape(-1, width).index_select(0, index).view(batch, -1, width)
    if gate is not None and a is not None:
        rows = rows + gate * a.reshape(-1, width).index_select(0, index).view(batch, -1, width).to(x.dtype)
    return layer_norm(rows, (width,), eps=eps) * (1 + scale) + shift


@_chosen_rows.register_fake
def _(
    x: Tensor, index: Tensor, scale: Tensor, shift: Tensor, eps: float, gate: Tensor | None, a: Tensor | None
) -> Tensor:
    return x.new_empty((x.shape[0], index.shape[0] // x.shape[0], x.shape[2]))


@_chosen_rows.register_kernel("cuda")
def _on_cuda(
    x: Tensor, index: Tensor, scale: Tensor, shift: Tensor, eps: float, gate: Tensor | None, a: Tensor | None
) -> Tensor:
    kernel = triton_kernel()
    if kernel is not None:
        try:
            with torch.cuda.device(x.device):  # Triton launches on the current device
                return launch(kernel, x, index, scale, shift, eps, gate, a)
        except Exception as error:  # no C compiler, an old GPU, ...: Triton has no common class for its refusals
            _tell_once(f"{type(error).__name__}: {error}".splitlines()[0])
    rows: Tensor = _chosen_rows._init_fn(x, index, scale, shift, eps, gate, a)
    return rows


@functools.cache
def _tell_once(reason: str) -> None:
    logging.getLogger("hasten").warning("the Triton norm of rows cannot be used here, torch does it (%s)", reason)


def launch(
    kernel: Any, x: Tensor, index: Tensor, scale: Tensor, shift: Tensor, eps: float, gate: Tensor | None,
    a: Tensor | None,
) -> Tensor:  # fmt: skip
    """The rows by the Triton kernel."""
    batch, _, width = x.shape
    chosen = index.shape[0] // batch
    out = x.new_empty((batch, chosen, width))
    adds = gate is not None and a is not None
    scale, shift = (m.expand(batch, 1, width).contiguous() for m in (scale, shift))
    gate = gate.expand(batch, 1, width).contiguous() if gate is not None else scale
    kernel[(batch * chosen,)](
        out, x.contiguous(), index, gate, x if a is None else a.contiguous(), scale, shift, chosen, width, eps,
        ADDS=adds, BLOCK=1 << (width - 1).bit_length(),
    )  # fmt: skip
    return out


@functools.cache
def triton_kernel() -> Any:
    """The kernel, compiled on its first launch; None where Triton is missing."""
    try:
        from hasten.kernels.token_rows import norm_rows
    except ImportError:
        return None
    return norm_rows
