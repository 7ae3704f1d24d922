"""Sana's own kernels: by torch against diffusers' modules, by Triton (its interpreter on a CPU) against torch.

Triton's interpreter cuts bfloat16 off instead of rounding, so a number may be off by one step of it there.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from hasten.kernels import decoder
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


@pytest.mark.parametrize("dtype", list(STEPS))
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 3, 5, 24), (1, 40, 2, 130)])
@pytest.mark.parametrize("added", [False, True])
def test_norm_add_equals_torch(shape: tuple[int, ...], added: bool, dtype: torch.dtype) -> None:
    pixels, residual = noise(*shape, dtype=dtype), noise(*shape, seed=1, dtype=dtype) if added else None
    weight, bias = noise(shape[-1], seed=2, dtype=dtype), noise(shape[-1], seed=3, dtype=dtype)
    others = (weight.float(), bias.float(), None if residual is None else residual.float())
    exact = decoder.norm_add_by_torch(pixels.float(), *others, 1e-5)
    agree(decoder.norm_add_by_triton(pixels, weight, bias, residual, 1e-5), exact, dtype)


@pytest.mark.parametrize("dtype", list(STEPS))
@pytest.mark.parametrize(("shape", "repeats"), [((1, 1, 1, 4), 4), ((2, 3, 9, 24), 4), ((1, 5, 18, 260), 2)])
@pytest.mark.parametrize("added", [False, True])
def test_spread_equals_torch(shape: tuple[int, ...], repeats: int, added: bool, dtype: torch.dtype) -> None:
    batch, height, width, channels = shape
    pixels, large = noise(*shape, dtype=dtype), (batch, 2 * height, 2 * width, channels * repeats // 4)
    update = noise(*large, seed=1, dtype=dtype) if added else None
    exact = decoder.spread_by_torch(pixels.float(), repeats, None if update is None else update.float())
    found = decoder.spread_by_triton(pixels, repeats, update)
    if added:
        agree(found, exact, dtype)
    else:
        assert torch.equal(found, exact.to(dtype))


def test_nan_stays_nan() -> None:
    q = noise(1, 8, 16)
    q[0, 3, 2] = float("nan")
    assert linear.linear_attention_by_triton(q, q.nan_to_num(), q.nan_to_num(), 1)[0, 3].isnan().all()
    assert linear.linear_attention_by_triton(q.nan_to_num(), q, q.nan_to_num(), 1).isnan().any()
