"""A block's modulation: by torch against its layers, by Triton (its interpreter on a CPU) against float32.

Triton's interpreter cuts bfloat16 off instead of rounding, so a number may be off by one step of it there.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

from hasten.kernels.modulation import modulation, modulation_by_torch, modulation_by_triton

pytest.importorskip("triton")
if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("without a GPU Triton's interpreter is needed: TRITON_INTERPRET=1", allow_module_level=True)

STEPS = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
SHAPES = [(1, 1, 1), (18, 33, 2), (7, 48, 1), (1, 130, 2), (41, 1500, 2)]  # outputs, C, layers


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def layers_of(count: int, outputs: int, inner: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    weights = [noise(outputs, inner, seed=1 + i, dtype=dtype) * inner**-0.5 for i in range(count)]
    return weights, [noise(outputs, seed=5 + i, dtype=dtype) for i in range(count)]


def agree(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within a step of the dtype, and of a sum's last place."""
    assert found.dtype == dtype and found.shape == exact.shape
    torch.testing.assert_close(found.float(), exact, rtol=1.01 * STEPS[dtype], atol=8 * 2.0**-18, equal_nan=True)


@pytest.mark.parametrize("dtype", list(STEPS))
@pytest.mark.parametrize(("outputs", "inner", "count"), SHAPES)
def test_the_kernel_equals_float32(outputs: int, inner: int, count: int, dtype: torch.dtype) -> None:
    vector = noise(1, inner, dtype=dtype) * 4
    weights, biases = layers_of(count, outputs, inner, dtype)
    exact = modulation_by_torch(vector.float(), [w.float() for w in weights], [b.float() for b in biases])
    agree(modulation_by_triton(vector, weights, biases), exact, dtype)
    agree(modulation_by_triton(vector, weights, biases, rows=2, warps=8, programs=3, stages=2), exact, dtype)


def test_nan_and_infinity_reach_what_they_belong_to() -> None:
    weights, biases = layers_of(2, 12, 64, torch.float32)
    weights[0][2, 5], biases[1][7] = float("inf"), float("nan")
    found = modulation_by_triton(noise(1, 64), weights, biases)
    agree(found, modulation_by_torch(noise(1, 64), weights, biases), torch.float32)
    assert [int(layer.isfinite().sum()) for layer in found] == [11, 11]
    for broken in (float("nan"), float("inf")):
        vector = noise(1, 64)
        vector[0, 3] = broken
        agree(
            modulation_by_triton(vector, weights, biases), modulation_by_torch(vector, weights, biases), torch.float32
        )


def test_it_is_what_silu_and_the_layers_give_and_torch_compile_sees_one_step() -> None:
    layers = [nn.Linear(16, 24, device="cuda" if torch.cuda.is_available() else "cpu") for _ in range(2)]
    vector = noise(2, 16)  # two pictures: torch's own products

    def all_of(vector: Tensor) -> Tensor:
        return modulation(vector, [(layer.weight, layer.bias) for layer in layers])

    with torch.no_grad():
        wanted = torch.stack([layer(nn.functional.silu(vector)) for layer in layers])
        assert torch.equal(all_of(vector), wanted)
        compiled = torch.compile(all_of, fullgraph=True, dynamic=True, backend="eager")
        assert torch.equal(compiled(vector), wanted)
