"""The one-pass change against torch's operations. Triton's interpreter is needed where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

from hasten.kernels import residual_sums
from hasten.signal import relative_l1

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")):
    pytest.skip("Triton's interpreter is needed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def change(*tensors: torch.Tensor, to_previous: bool = True) -> torch.Tensor:
    kernels = residual_sums.triton_kernels()
    return residual_sums.launch(kernels, *(t.to(DEVICE) for t in tensors), to_previous).cpu()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 33, 129), (1, 1025, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("to_previous", [True, False])
def test_it_is_the_change_that_torch_finds(
    shape: tuple[int, ...], dtype: torch.dtype, to_previous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residual_sums, "PROGRAMS", 4)  # so that each takes several rounds
    image, entry, before = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
    wanted = relative_l1(image - entry, before, relative_to="previous" if to_previous else "current")
    # The interpreter cuts off where a GPU rounds to bfloat16.
    tolerance = 4e-3 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1e-5
    found = change(image, entry, before, to_previous=to_previous)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0)
    assert torch.equal(change(image, entry, before, to_previous=to_previous), found)


def test_nothing_moved_is_no_change_and_nan_is_seen() -> None:
    image, entry = torch.randn(1, 5, 7), torch.randn(1, 5, 7)
    assert change(image, image, torch.zeros(1, 5, 7)) == 0.0
    assert change(image, entry, image - entry) == 0.0
    assert change(image, entry, torch.zeros(1, 5, 7)) == float("inf")
    image[0, 2, 3] = float("nan")
    assert change(image, entry, entry).isnan()
