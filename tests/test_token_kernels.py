"""The Triton kernels of partial evaluations against torch: interpreted on a CPU, and on a GPU as they are compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
SCRIPT = """
import os
import torch
from hasten.kernels import chosen_rows, eight_rows, gated_forecast, gated_sum, received, rotation

device = os.environ["ON"]
dtypes = (torch.float32, torch.float16) if device == "cpu" else (torch.float32, torch.float16, torch.bfloat16)


def noise(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


for dtype in dtypes:
    # Products of tensor cores round float32 to TF32; a share of attention is of the order of 1 / 150.
    reach = dict(rtol=1e-2, atol=1e-4) if device == "cuda" or dtype != torch.float32 else dict(rtol=1e-4, atol=1e-6)
    for width, asked in ((16, 70), (48, 70), (128, 130)):
        q, k = noise(2, 3, asked, width, seed=1, dtype=dtype), noise(2, 3, 150, width, seed=2, dtype=dtype)
        found = received.launch(received.triton_kernel(), q, k)
        torch.testing.assert_close(found, received._attention_received._init_fn(q, k), **reach)
        assert torch.equal(found, received.launch(received.triton_kernel(), q, k))
        by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
        assert torch.equal(found, received.launch(received.triton_kernel(), *by_token))
    for angles in (1, 2):
        x, angle = noise(2, 3, 70, 24, seed=3, dtype=dtype), noise(angles, 1, 70, 12, seed=4)
        found = rotation.launch(rotation.triton_kernel(), x, angle.cos(), angle.sin())
        torch.testing.assert_close(found, rotation._rotated._init_fn(x, angle.cos(), angle.sin()))
        by_token = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(found, rotation.launch(rotation.triton_kernel(), by_token, angle.cos(), angle.sin()))
    x, a, b = (noise(2, 9, 1100, seed=i, dtype=dtype) for i in (5, 6, 7))
    gate, gate_b, scale, shift = (noise(n, 1, 1100, seed=8 + i, dtype=dtype) for i, n in enumerate((2, 2, 1, 2)))
    index = torch.tensor([3, 8, 9 + 2, 9 + 2], device=device)
    step = dict(rtol=2**-7, atol=2e-2) if dtype != torch.float32 else dict(rtol=1e-5, atol=1e-5)  # torch rounds between
    for second in ((None, None), (gate_b, b)):
        found = gated_sum.launch(gated_sum.triton_kernel(), x, gate, a, *second)
        torch.testing.assert_close(found, gated_sum._gated_sum._init_fn(x, gate, a, *second), **step)
    weights = torch.tensor([1.5, -2.0, 0.5, 1.0], device=device)
    for count in (1, 2, 3, 4):
        for second in ((None, []), (gate_b, [b, x, a, b][:count])):
            given = (x, weights, gate, [a, b, x, a][:count], *second)
            found = gated_forecast.launch(gated_forecast.triton_kernel(), *given)
            torch.testing.assert_close(found, gated_forecast.in_torch(*given), **step)
    for first in ((None, None), (gate, a)):
        found = chosen_rows.launch(chosen_rows.triton_kernel(), x, index, scale, shift, 1e-6, *first)
        expected = chosen_rows._chosen_rows._init_fn(x, index, scale, shift, 1e-6, *first)
        torch.testing.assert_close(found, expected, **step)
    for some in (None, torch.tensor([7, 0, 3], device=device)):
        rows = noise(9 if some is None else 3, 1100, seed=13, dtype=dtype) * 50
        packed = [
            (torch.zeros(9, 1100, device=device).to(torch.float8_e4m3fn), torch.ones(9, 1, device=device)) for _ in "ab"
        ]
        eight_rows.launch_pack(eight_rows.triton_kernels(), rows, *packed[0], some)
        eight_rows.pack_in_torch(rows, *packed[1], some)
        found = torch.empty(len(rows), 1100, dtype=dtype, device=device)
        eight_rows.launch_unpack(eight_rows.triton_kernels(), *packed[0], some, found)
        expected = eight_rows.unpack_in_torch(*packed[1], dtype, some)
        torch.testing.assert_close(packed[0][1], packed[1][1])
        # One step of float8's digits; the interpreter loses a carry where rounding reaches the next power of two.
        close = torch.isclose(found, expected, rtol=2**-3, atol=0.5).float().mean().item()
        assert close >= (0.97 if device == "cpu" else 1.0), close
high = torch.tensor([[[6e4, -6e4]]]).to(device, torch.float16)
found = gated_sum.launch(gated_sum.triton_kernel(), high, torch.ones_like(high), high, None, None)
assert found.tolist() == [[[65504.0, -65504.0]]]
"""


def run(device: str, **environment: str) -> None:
    environment = {**os.environ, "ON": device, "PYTHONPATH": str(SOURCE), **environment}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
@pytest.mark.slow  # torch is imported anew: Triton reads TRITON_INTERPRET once
def test_the_interpreted_kernels_do_as_torch_does() -> None:
    run("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_the_compiled_kernels_do_as_torch_does() -> None:
    run("cuda")
