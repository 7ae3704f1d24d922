"""Distances between tensors, against the same written in float64."""

from __future__ import annotations

import pytest
import torch

from hasten.signal import largest, magnitude_ratio, mean_abs, relative_l1


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relative_to", ["previous", "current"])
def test_relative_l1_is_the_mean_distance_over_the_mean_size(dtype: torch.dtype, relative_to: str) -> None:
    now, before = noise(2, 50, 8, dtype=dtype), 3 * noise(2, 50, 8, seed=1, dtype=dtype)
    base = before if relative_to == "previous" else now
    # The difference itself is rounded to the tensors' dtype, the sums are not.
    expected = (now - before).double().abs().mean() / base.double().abs().mean()
    found = relative_l1(now, before, relative_to=relative_to)
    assert found.dtype == torch.float32 and found.shape == ()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_sums_are_kept_in_float32() -> None:
    # In bfloat16 a running sum of ones stops at 256, and in float16 65504 is the end.
    many = torch.full((1, 300, 300), 8.0, dtype=torch.float16)
    assert float(mean_abs(many)) == 8.0
    assert float(relative_l1(many, many * 2)) == 0.5


def test_nothing_moved_is_no_change_even_from_nothing() -> None:
    zero = torch.zeros(1, 4, 4)
    assert float(relative_l1(zero, zero)) == 0.0
    assert float(relative_l1(noise(1, 4, 4), noise(1, 4, 4))) == 0.0


def test_a_change_from_nothing_is_infinite() -> None:
    assert float(relative_l1(torch.ones(1, 4, 4), torch.zeros(1, 4, 4))) == float("inf")


def test_nan_is_never_small() -> None:
    broken = noise(1, 4, 4)
    broken[0, 0, 0] = float("nan")
    for change in (relative_l1(broken, noise(1, 4, 4)), relative_l1(noise(1, 4, 4), broken)):
        assert not float(change) < 10.0
    assert not largest([torch.tensor(0.1), torch.tensor(float("nan")), torch.tensor(0.2)]) < 10.0


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        relative_l1(noise(1, 4, 4), noise(1, 5, 4))


def test_the_largest_change_decides() -> None:
    assert largest([torch.tensor(0.25)]) == 0.25
    assert largest([torch.tensor(0.25), torch.tensor(0.75), torch.tensor(0.5)]) == 0.75


def test_magnitude_ratio_is_the_mean_of_the_tokens_ratios() -> None:
    before = noise(2, 5, 8)
    scales = torch.tensor([0.5, 1.0, 1.5, 2.0, 0.0]).view(1, 5, 1)
    assert float(magnitude_ratio(before * scales, before)) == pytest.approx(1.0, rel=1e-6)
    assert float(magnitude_ratio(before, torch.zeros_like(before))) > 1e6
