"""x + gate * a (+ gate * b): the one dense pass of a partial evaluation, all read once and written once.

On a GPU with Triton one kernel adds in float32 and rounds once; elsewhere torch multiplies and adds as the hosts do.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

LARGEST_HALF = torch.finfo(torch.float16).max


def gated_sum(x: Tensor, gate: Tensor, a: Tensor, gate_b: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """x + gate * a, and + gate_b * b where given: a new tensor of x's shape and dtype.

    x, a, b: (B, N, C). gates: (B, 1, C) or (1, 1, C). In float16 sums beyond +-65504 become that, as in the hosts.
    """
    if x.is_cuda and not torch.compiler.is_compiling():
        at_once: Tensor = _on_cuda(x, gate, a, gate_b, b)  # a dispatch costs as much as a launch
        return at_once
    summed: Tensor = torch.ops.hasten.gated_sum(x, gate, a, gate_b, b)
    return summed


@torch.library.custom_op("hasten::gated_sum", mutates_args=())
def _gated_sum(x: Tensor, gate: Tensor, a: Tensor, gate_b: Tensor | None, b: Tensor | None) -> Tensor:
    out = x + gate * a.to(x.dtype)
    if gate_b is not None and b is not None:
        out = out + gate_b * b.to(x.dtype)
    return out.clamp_(-LARGEST_HALF, LARGEST_HALF) if x.dtype == torch.float16 else out


@_gated_sum.register_fake
def _(x: Tensor, gate: Tensor, a: Tensor, gate_b: Tensor | None, b: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@_gated_sum.register_kernel("cuda")
def _on_cuda(x: Tensor, gate: Tensor, a: Tensor, gate_b: Tensor | None, b: Tensor | None) -> Tensor:
    kernel = triton_kernel()
    if kernel is not None:
        try:
            with torch.cuda.device(x.device):  # Triton launches on the current device
                return launch(kernel, x, gate, a, gate_b, b)
        except Exception as error:  # no C compiler, an old GPU, ...: Triton has no common class for its refusals
            _tell_once(f"{type(error).__name__}: {error}".splitlines()[0])
    summed: Tensor = _gated_sum._init_fn(x, gate, a, gate_b, b)
    return summed


@functools.cache
def _tell_once(reason: str) -> None:
    logging.getLogger("hasten").warning("the Triton gated sum cannot be used here, torch does it (%s)", reason)


def launch(kernel: Any, x: Tensor, gate: Tensor, a: Tensor, gate_b: Tensor | None, b: Tensor | None) -> Tensor:
    """The sum by the Triton kernel."""
    batch, tokens, width = x.shape
    x, a = x.contiguous(), a.contiguous()
    out = torch.empty_like(x)
    gate = gate.expand(batch, 1, width).contiguous()
    both = gate_b is not None and b is not None
    second = b.contiguous() if both and b is not None else a
    gate_b = gate_b.expand(batch, 1, width).contiguous() if both and gate_b is not None else gate
    block = 1024
    kernel[(batch * tokens, (width + block - 1) // block)](
        out, x, gate, a, gate_b, second, tokens, width, BOTH=both, HALF=x.dtype == torch.float16, BLOCK=block
    )
    return out


@functools.cache
def triton_kernel() -> Any:
    """The kernel, compiled on its first launch; None where Triton is missing."""
    try:
        from hasten.kernels.token_rows import sum_gated
    except ImportError:
        return None
    return sum_gated
