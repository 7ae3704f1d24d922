"""Sana's own kernels: by torch against diffusers' modules, by Triton (its interpreter on a CPU) against torch.

Triton's interpreter cuts bfloat16 off instead of rounding, so a number may be off by one step of it there.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from hasten.kernels import gated_conv as conv
from hasten.kernels import linear_attention as linear

pytest.importorskip("triton")
if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("without a GPU Triton's interpreter is needed: TRITON_INTERPRET=1", allow_module_level=True)

STEPS = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def agree(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within a step of the dtype, and of a sum's last place."""
    assert found.dtype == dtype and found.shape == exact.shape
    torch.testing.assert_close(found.float(), exact.float(), rtol=1.01 * STEPS[dtype], atol=4 * 2.0**-18)


@pytest.mark.parametrize("dtype", list(STEPS))
@pytest.mark.parametrize(("batch", "height", "width", "channels"), [(1, 1, 1, 16), (2, 5, 9, 24), (1, 8, 3, 80)])
def test_gated_conv_equals_torch(batch: int, height: int, width: int, channels: int, dtype: torch.dtype) -> None:
    hidden = noise(batch, height * width, 2 * channels, dtype=dtype)
    weight, bias = noise(2 * channels, 1, 3, 3, seed=1, dtype=dtype), noise(2 * channels, seed=2, dtype=dtype)
    exact = conv.gated_conv_by_torch(hidden.float(), weight.float(), bias.float(), height, width)
    agree(conv.gated_conv_by_triton(hidden, weight, bias, height, width), exact, dtype)


@pytest.mark.parametrize("dtype", list(STEPS))
@pytest.mark.parametrize(("batch", "tokens", "heads", "width"), [(1, 1, 1, 16), (2, 70, 3, 32), (1, 1100, 2, 32)])
def test_linear_attention_equals_torch(batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    q, k, v = (noise(batch, tokens, heads * width, seed=seed, dtype=dtype) for seed in (3, 4, 5))
    exact = linear.linear_attention_by_torch(q.float(), k.float(), v.float(), heads)
    agree(linear.linear_attention_by_triton(q, k, v, heads), exact, dtype)


def test_nan_stays_nan() -> None:
    q = noise(1, 8, 16)
    q[0, 3, 2] = float("nan")
    assert linear.linear_attention_by_triton(q, q.nan_to_num(), q.nan_to_num(), 1)[0, 3].isnan().all()
    assert linear.linear_attention_by_triton(q.nan_to_num(), q, q.nan_to_num(), 1).isnan().any()
