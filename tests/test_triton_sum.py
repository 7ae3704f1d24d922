"""The Triton kernel of the stand-in against torch: interpreted on a CPU, and on a GPU as it is compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
SCRIPT = """
import torch
from hasten.kernels.weighted_sum import launch, triton_kernel, weighted_sum

kernel = triton_kernel()
assert "tl" in vars(__import__("sys").modules["hasten.kernels.sum_terms"])
for count in (1, 2, 8, 9):
    for dtype in (torch.float32, torch.float16):
        noise = (torch.randn(3, 700, generator=torch.Generator().manual_seed(i)) for i in range(count + 1))
        base, *deltas = (x.to(dtype) for x in noise)
        weights = [(-1.0) ** i * (0.3 + i) for i in range(count)]
        torch.testing.assert_close(launch(kernel, base, deltas, weights), weighted_sum(base, deltas, weights))
high = torch.tensor([6e4, -6e4, float("nan"), 1.0]).half()
for sums in (launch(kernel, high, [high], [2.0]), weighted_sum(high, [high], [2.0])):
    torch.testing.assert_close(sums, torch.tensor([65504.0, -65504.0, float("nan"), 3.0]).half(), equal_nan=True)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
@pytest.mark.slow  # torch is imported anew: Triton reads TRITON_INTERPRET once
def test_the_interpreted_kernel_sums_as_torch_does() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_compiled_kernel_sums_as_torch_does(count: int) -> None:
    import torch

    from hasten.kernels.weighted_sum import launch, triton_kernel, weighted_sum

    kernel = triton_kernel()
    if kernel is None:
        pytest.skip("no Triton")
    base, *deltas = (
        torch.randn(2, 4099, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(count + 1)
    )
    weights = [(-1.0) ** i * (0.3 + i) for i in range(count)]
    found = launch(kernel, base.cuda(), [d.cuda() for d in deltas], weights)
    # bfloat16's own rounding step: the two may add up in another order.
    torch.testing.assert_close(found.cpu(), weighted_sum(base, deltas, weights), rtol=2.0**-7, atol=1e-2)
