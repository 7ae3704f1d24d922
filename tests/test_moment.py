"""Where an evaluation lies is read off its sigma: whatever the sampler, the dtype and the part that is run."""

from __future__ import annotations

import math
import struct
from itertools import pairwise

import pytest
import torch

from hasten.moment import Timeline
from hasten.session import ROUNDING

BF16, FP16 = ROUNDING[torch.bfloat16], ROUNDING[torch.float16]


def fp16(value: float) -> float:
    """The nearest float16."""
    return float(struct.unpack("<e", struct.pack("<e", value))[0])


def bf16(value: float) -> float:
    """The nearest bfloat16, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    bits += 0x7FFF + (bits >> 16 & 1)
    return float(struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0])


def shifted(steps: int, mu: float) -> list[float]:
    """FLUX's schedule: sigma moved towards 1 by e^mu, the final 0 included."""
    return [*(math.exp(mu) / (math.exp(mu) + steps / (steps - i) - 1.0) for i in range(steps)), 0.0]


MUS = [0.5 + 0.05 * i for i in range(14)]


@pytest.mark.parametrize("steps", [4, 8, 20, 28, 50, 100])
@pytest.mark.parametrize("mu", MUS)
def test_sigmas_rounded_to_bf16_and_fp16_find_their_intervals_in_order(steps: int, mu: float) -> None:
    sigmas = shifted(steps, mu)
    timeline = Timeline(sigmas)
    assert timeline.intervals == steps
    for rounded, tolerance in ((bf16, BF16), (fp16, FP16)):
        after = None
        for interval, sigma in enumerate(sigmas[:-1]):
            # Pipelines round the timestep, and its thousandth part again.
            seen = rounded(rounded(sigma * 1000.0) / 1000.0)
            assert timeline.place(seen, tolerance=tolerance, after=after) == (interval, sigma)
            assert timeline.place(rounded(sigma), tolerance=tolerance, after=after) == (interval, sigma)
            after = interval


def test_bf16_blurs_neighbours_so_the_order_is_needed() -> None:
    # Were this untrue, the test above would prove nothing.
    sigmas = shifted(100, 1.15)
    seen = [bf16(bf16(sigma * 1000.0) / 1000.0) for sigma in sigmas[:-1]]
    assert len(set(seen)) < 100
    assert [Timeline(sigmas).place(sigma, tolerance=BF16)[0] for sigma in seen] != list(range(100))


@pytest.mark.parametrize("mu", MUS)
def test_float32_sigmas_find_their_entries_whatever_came_before(mu: float) -> None:
    sigmas = shifted(100, mu)
    timeline = Timeline(sigmas)
    for interval, sigma in enumerate(sigmas[:-1]):
        for wobble in (0.0, 2e-6, -2e-6):
            for after in (None, interval - 1, interval):
                assert timeline.place(sigma * (1 + wobble), after=after) == (interval, sigma)


def test_heuns_repeated_sigmas_count_once() -> None:
    sigmas = [1.0, 0.7, 0.7, 0.4, 0.4, 0.1, 0.1, 0.0]
    timeline = Timeline(sigmas)
    assert timeline.sigmas == (1.0, 0.7, 0.4, 0.1, 0.0)
    placed, after = [], None
    for sigma in sigmas[:-1]:
        interval, snapped = timeline.place(sigma, after=after)
        assert snapped == sigma
        placed.append(interval)
        after = interval
    assert placed == [0, 1, 1, 2, 2, 3, 3]


def test_dpm_2s_mid_sigmas_lie_in_the_interval_that_they_halve() -> None:
    sigmas = shifted(20, 0.8)
    timeline = Timeline(sigmas)
    after = None
    for interval, (high, low) in enumerate(pairwise(sigmas[:-1])):
        assert timeline.place(high, after=after) == (interval, high)
        middle = math.sqrt(high * low)
        assert timeline.place(middle, after=interval) == (interval, middle)
        after = interval


def test_a_sigma_outside_the_schedule_is_clamped_to_its_ends() -> None:
    timeline = Timeline([0.8, 0.5, 0.2])
    assert timeline.place(0.9) == (0, 0.9)
    assert timeline.place(14.6) == (0, 14.6)
    assert timeline.place(0.1) == (1, 0.1)
    assert timeline.place(0.0) == (1, 0.0)
    assert timeline.place(0.2) == (1, 0.2)


@pytest.mark.parametrize("sigmas", [[0.5, 0.6, 0.0], [1.0, 0.5, 0.500001, 0.0], [0.0, 1.0]])
def test_rising_sigmas_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="rise from") as refusal:
        Timeline(sigmas)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("sigmas", [[], [1.0], [0.5, 0.5]])
def test_a_schedule_of_no_step_is_refused(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two different ones"):
        Timeline(sigmas)
