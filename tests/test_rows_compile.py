"""Every launch of element-wise kernels compiles for a real GPU: Triton's interpreter takes what its compiler refuses.

The compiler makes an argument that equals 1 a constant of its own (batch 1, one token), which has no methods. Launches
are recorded as they would go out and compiled for compute capability 9.0; no GPU is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compiled import compile_for_hopper

from hasten.kernels import gated_conv, linear_attention, modulation, residual_sums, rows

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter stands in for the compiler", allow_module_level=True)

FP8 = torch.float8_e4m3fn
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def launches(work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What `work` would launch."""
    found: list[Launch] = []
    module = rows.triton_kernels()
    monkeypatch.setattr(module, "launch", lambda kernel, grid, *args, **options: found.append((kernel, args, options)))
    work()
    return found


def noise(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


WORK: dict[str, Callable[[int, int, int, torch.dtype, bool], Any]] = {
    "norm_modulate": lambda b, t, n, dtype, joint: rows.norm_modulate_by_triton(
        noise(b, t, 256), noise(b, n, 256), noise(b, 1536), noise(b, 1536), 0, 1, joint, 1e-6, dtype
    ),
    "add_norm_modulate": lambda b, t, n, dtype, joint: rows.add_norm_modulate_by_triton(
        *(noise(b, t, 256), noise(b, n, 256), noise(b * (t + n), 256), noise(b, 1536), noise(b, 1536)),
        *(2, 3, 4, 1e-6, dtype),
    ),
    "add_gated": lambda b, t, n, dtype, joint: rows.add_gated_by_triton(
        noise(b, t, 256), noise(b, n, 256), noise(b * (t + n), 256), noise(b, 768), noise(b, 768), 2, joint
    ),
    "gelu": lambda b, t, n, dtype, joint: rows.gelu_beside_by_triton(
        noise(b * n, 256) if joint else None, noise(b * n, 1024), dtype
    ),
    "gelu by the GPU's own tanh": lambda b, t, n, dtype, joint: rows.gelu_beside_by_triton(
        noise(b * n, 256) if joint else None, noise(b * n, 768), dtype, fast=True, programs=2, stages=2
    ),
    "split": lambda b, t, n, dtype, joint: rows.split_streams_by_triton(noise(b, t + n, 256), t, dtype),
    "norm_rope": lambda b, t, n, dtype, joint: rows.norm_rope_by_triton(
        *(noise(b * (t + n), 1024), (noise(128),) * 4, noise(t + n, 64), noise(t + n, 64)),
        *(b, t, 2, joint, 1e-6),
    ),
    "modulation of one layer": lambda b, t, n, dtype, joint: modulation.modulation_by_triton(
        noise(1, 256), [noise(1536, 256)], [noise(1536)]
    ),
    "modulation of two layers": lambda b, t, n, dtype, joint: modulation.modulation_by_triton(
        noise(1, 384), [noise(768, 384)] * 2, [noise(768)] * 2
    ),
    "gated_conv": lambda b, t, n, dtype, joint: gated_conv.gated_conv_by_triton(
        noise(b, (t + n) * n, 128), noise(128, 1, 3, 3), noise(128), t + n, n
    ),
    "linear_attention": lambda b, t, n, dtype, joint: linear_attention.linear_attention_by_triton(
        *(noise(b, t + n, 32 * n) for _ in range(3)), n
    ),
}


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize(("batch", "text", "image"), [(1, 1, 1), (1, 16, 32), (2, 0, 33)])
def test_every_launch_compiles_for_a_gpu(
    name: str, batch: int, text: int, image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [(dtype, joint) for dtype in (torch.bfloat16, FP8) for joint in (True, False)]
    done = set()
    for dtype, joint in kinds:
        for kernel, args, options in launches(
            lambda d=dtype, j=joint: WORK[name](batch, text, image, d, j), monkeypatch
        ):
            key = (dtype if "QUANTISES" in options else None, tuple(options.items()))
            if key not in done:
                done.add(key)
                assert "cubin" in compile_for_hopper(kernel, args, options).asm
    assert done


class Noted:
    """A kernel whose launches are noted instead."""

    def __init__(self, kernel: Any, found: list[Launch]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.found.append((self.kernel, args, options))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2048, 1024)])
@pytest.mark.parametrize("to_previous", [True, False])
def test_the_change_compiles_for_a_gpu(shape: tuple[int, ...], to_previous: bool) -> None:
    found: list[Launch] = []
    kernels = residual_sums.triton_kernels()
    noted = SimpleNamespace(change_of=Noted(kernels.change_of, found))
    residual_sums.launch(noted, *(noise(*shape) for _ in range(3)), to_previous)
    assert len(found) == 1
    for launch in found:
        compile_for_hopper(*launch)
