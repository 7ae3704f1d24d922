"""The stand-in's arithmetic against float64, and the rounding that it promises."""

from __future__ import annotations

import pytest
import torch

from hasten.kernels.weighted_sum import weighted_sum


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 17, 33), (1, 4096, 8)])
@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("delta_dtype", [None, torch.float32])
def test_it_is_the_sum_in_float32_rounded_once(
    shape: tuple[int, ...], count: int, dtype: torch.dtype, delta_dtype: torch.dtype | None
) -> None:
    base = noise(*shape, dtype=dtype)
    deltas = [noise(*shape, seed=i + 1, dtype=delta_dtype or dtype) for i in range(count)]
    weights = [(-1.0) ** i * (0.3 + i) for i in range(count)]
    terms = [w * d.double() for d, w in zip(deltas, weights, strict=True)]
    exact = base.double() + sum(terms)
    found = weighted_sum(base, deltas, weights)
    assert found.dtype == dtype and found.shape == base.shape
    # Half a unit of the dtype for the one rounding, and float32's own error on the sum of sizes.
    size = base.double().abs() + sum(t.abs() for t in terms)
    slack = torch.finfo(dtype).eps / 2 * exact.abs() + (count + 2) * 2.0**-23 * size + 1e-7
    assert bool(((found.double() - exact).abs() <= slack).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_holding_one_delta_is_plain_addition(dtype: torch.dtype) -> None:
    base, delta = noise(2, 9, 5, dtype=dtype), noise(2, 9, 5, seed=1, dtype=dtype)
    assert torch.equal(weighted_sum(base, [delta], [1.0]), base + delta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_held_delta_comes_to_the_same_whoever_adds_it(dtype: torch.dtype) -> None:
    wide, delta = noise(2, 9, 10, dtype=dtype) * 300, noise(2, 9, 5, seed=1, dtype=dtype) * 300
    wide[0, 0, :3], delta[0, 0, 1:4] = float("nan"), float("inf")
    for base in (wide[..., :5].contiguous(), wide[..., :5]):
        for other in (delta, delta.float()):
            wanted = torch.ops.hasten.weighted_sum(base, [other], [1.0])
            found = weighted_sum(base, [other], [1.0])
            torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.0, equal_nan=True)
            assert found.is_contiguous()


@pytest.mark.parametrize("weights", [[], [0.0], [0.0, 0.0]])
def test_without_weight_a_copy_of_the_base_comes_back(weights: list[float]) -> None:
    base = noise(2, 9, 5)
    broken = torch.full_like(base, float("nan"))  # a delta of weight 0 is not read
    found = weighted_sum(base, [broken] * len(weights), weights)
    assert torch.equal(found, base)
    assert found.data_ptr() != base.data_ptr()


def test_a_delta_of_weight_zero_is_not_read() -> None:
    base, delta = noise(2, 9, 5), noise(2, 9, 5, seed=1)
    broken = torch.full_like(base, float("nan"))
    assert torch.equal(weighted_sum(base, [broken, delta], [0.0, 0.5]), weighted_sum(base, [delta], [0.5]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [[1.0], [2.0, -1.0]])
def test_what_is_given_is_not_changed(dtype: torch.dtype, weights: list[float]) -> None:
    base = noise(2, 9, 5, dtype=dtype)
    deltas = [noise(2, 9, 5, seed=i + 1, dtype=dtype) for i in range(len(weights))]
    before = [t.clone() for t in (base, *deltas)]
    found = weighted_sum(base, deltas, weights)
    found.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip((base, *deltas), before, strict=True))


def test_unequal_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="1 deltas and 2 weights"):
        weighted_sum(noise(1, 2, 3), [noise(1, 2, 3)], [1.0, 2.0])


def test_a_base_that_is_not_contiguous_is_summed_in_place_of_its_values() -> None:
    base, delta = noise(4, 6, 5)[:, 2:], noise(4, 4, 5, seed=1)
    assert torch.equal(weighted_sum(base, [delta], [2.0]), torch.add(base.contiguous(), delta, alpha=2.0))


def test_a_float16_sum_that_overshoots_is_its_largest_number() -> None:
    high = torch.tensor([6e4, -6e4, float("nan"), 1.0]).half()
    expected = torch.tensor([65504.0, -65504.0, float("nan"), 3.0]).half()
    torch.testing.assert_close(weighted_sum(high, [high], [2.0]), expected, equal_nan=True)
    # Only the rounded sum is clamped, never what it is made of.
    torch.testing.assert_close(weighted_sum(high, [high, high], [2.0, -2.0]), high, equal_nan=True)
    wide = high.float()
    assert float(weighted_sum(wide, [wide], [2.0])[0]) == 3 * float(high[0])
