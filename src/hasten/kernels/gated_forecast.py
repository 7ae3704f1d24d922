"""x + gate * (sum of w_i a_i) (+ gate_b * (sum of w_i b_i)): forecasts and their dense pass in one, all read once.

The weights lie on the device, so that a recorded evaluation takes each one's own. On a GPU with Triton one kernel adds
in float32 and rounds once; elsewhere torch sums the forecasts first.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.gated_sum import gated_sum

# Triton has no lists of pointers on the versions we support; a parabola has three terms.
TERMS = 4


def gated_forecast(
    x: Tensor, weights: Tensor, gate: Tensor, a: Sequence[Tensor], gate_b: Tensor | None, b: Sequence[Tensor]
) -> Tensor:
    """x + gate * (weights . a), and + gate_b * (weights . b) where given: a new tensor of x's shape and dtype.

    x and each of a and b: (B, N, C); at most TERMS of each. weights: (len(a),) float32 on x's device. gates:
    (B, 1, C) or (1, 1, C). In float16 sums beyond +-65504 become that, as in the hosts.
    """
    assert 0 < len(a) <= TERMS and len(b) in (0, len(a))
    if x.is_cuda and not torch.compiler.is_compiling():
        kernel = triton_kernel()
        if kernel is not None:
            try:
                with torch.cuda.device(x.device):  # Triton launches on the current device
                    return launch(kernel, x, weights, gate, a, gate_b, b)
            except Exception as error:  # no C compiler, an old GPU, ...: Triton has no common class for its refusals
                _tell_once(f"{type(error).__name__}: {error}".splitlines()[0])
    return in_torch(x, weights, gate, a, gate_b, b)


def in_torch(
    x: Tensor, weights: Tensor, gate: Tensor, a: Sequence[Tensor], gate_b: Tensor | None, b: Sequence[Tensor]
) -> Tensor:
    """The same by torch."""
    second = _weighted(weights, b, x.dtype) if gate_b is not None and b else None
    return gated_sum(x, gate, _weighted(weights, a, x.dtype), None if second is None else gate_b, second)


def _weighted(weights: Tensor, terms: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    total = weights[0] * terms[0].float()
    for i, term in enumerate(terms[1:], 1):
        total += weights[i] * term.float()
    return total.to(dtype)


@functools.cache
def _tell_once(reason: str) -> None:
    logging.getLogger("hasten").warning("the Triton gated forecast cannot be used here, torch does it (%s)", reason)


def launch(
    kernel: Any, x: Tensor, weights: Tensor, gate: Tensor, a: Sequence[Tensor], gate_b: Tensor | None,
    b: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """The sum by the Triton kernel."""
    batch, tokens, width = x.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    both = gate_b is not None and bool(b)
    gate = gate.expand(batch, 1, width).contiguous()
    gate_b = gate_b.expand(batch, 1, width).contiguous() if both and gate_b is not None else gate
    first = [term.contiguous() for term in a]
    second = [term.contiguous() for term in b] if both else first
    spare = [x] * (TERMS - len(first))
    block = 1024
    kernel[(batch * tokens, (width + block - 1) // block)](
        out, x, weights, gate, *first, *spare, gate_b, *second, *spare, tokens, width,
        COUNT=len(first), BOTH=both, HALF=x.dtype == torch.float16, BLOCK=block,
    )  # fmt: skip
    return out


@functools.cache
def triton_kernel() -> Any:
    """The kernel, compiled on its first launch; None where Triton is missing."""
    try:
        from hasten.kernels.token_rows import sum_forecasts
    except ImportError:
        return None
    return sum_forecasts
