"""Policies on paper: each published rule, written out a second time here, gives the same decisions."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from hasten.moment import Moment
from hasten.policy import Decision, Policy, make_policy, stretched
from hasten.recipe import TEACACHE_FLUX, Cache

# Source: diffusers, hooks/mag_cache.py (FLUX_MAG_RATIOS).
FLUX_RATIOS = [1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047]
FLUX_RATIOS += [1.01562, 1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484]
FLUX_RATIOS += [0.95703, 0.93359, 0.89062]


def moments(count: int) -> list[Moment]:
    return [Moment(i, i, count, 1.0 - i / count) for i in range(count)]


def replay(cache: Cache, changes: Sequence[float | None], policy: Policy | None = None) -> str:
    """The strip of a recorded run: C computed, . reused. Reused like the session does."""
    policy = policy or make_policy(cache, (1,))
    strip = ""
    for moment, change in zip(moments(len(changes)), changes, strict=True):
        forced = policy.forced(moment) is not None
        decision = Decision.COMPUTE if forced else policy.decide(moment, change, 1)
        policy.settled(moment, decision, forced=forced)
        strip += "C" if decision is Decision.COMPUTE else "."
    return strip


def free(method: str, **settings: Any) -> Cache:
    """A cache with no other limit than its rule's."""
    return Cache(method=method, first=False, last=False, **settings)


def recorded(seed: int, count: int, top: float) -> list[float]:
    """Changes as runs have them: large first, small in the middle, rising in the end."""
    rng = random.Random(seed)
    curve = [0.2 + 0.8 * (2 * i / (count - 1) - 1) ** 2 for i in range(count)]
    return [top * c * rng.uniform(0.5, 1.5) for c in curve]


def published_teacache(changes: Sequence[float], threshold: float, coefficients: Sequence[float]) -> str:
    """TeaCache4FLUX: first and last computed, a polynomial added up, the sum dropped when it reaches the threshold."""
    rescale, total, strip = np.poly1d(coefficients), 0.0, ""
    for i, change in enumerate(changes):
        if i in (0, len(changes) - 1):
            compute, total = True, 0.0
        else:
            total += float(rescale(change))
            compute = not total < threshold
            if compute:
                total = 0.0
        strip += "C" if compute else "."
    return strip


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("threshold", [0.1, 0.25, 0.4, 0.6, 0.8, 2.0])
def test_teacache_equals_its_published_rule_on_recorded_signals(threshold: float, seed: int) -> None:
    changes = recorded(seed, 28, 0.3)
    found = replay(Cache(method="teacache", threshold=threshold), changes)
    assert found == published_teacache(changes, threshold, TEACACHE_FLUX)
    own = (3.0, -1.0, 0.5, 0.02)
    found = replay(Cache(method="teacache", threshold=threshold, coefficients=own), changes)
    assert found == published_teacache(changes, threshold, own)


def test_teacaches_knob_is_the_staircase_that_its_polynomial_makes() -> None:
    # The polynomial's least value is 0.180, so no threshold below it ever reuses; 0.4 gives two in a row at most.
    changes = [0.053] * 20
    assert replay(Cache(method="teacache", threshold=0.17), changes) == "C" * 20
    assert replay(Cache(method="teacache", threshold=0.2), changes[:6]) == "C.C.CC"
    assert replay(Cache(method="teacache", threshold=0.4), changes[:8]) == "C..C..CC"


def test_accumulated_changes_start_from_nothing_after_each_computation() -> None:
    cache = free("teacache", threshold=0.35, coefficients=(1.0, 0.0))
    assert replay(cache, [None, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]) == "C...C...C"
    # A computation that was forced drops the sum too.
    limited = free("teacache", threshold=0.35, coefficients=(1.0, 0.0), max_consecutive_hits=1)
    assert replay(limited, [None, 0.3, 0.3, 0.3, 0.3]) == "C.C.C"


def test_easycache_adds_changes_as_they_are() -> None:
    changes: list[float | None] = [None, 0.04, 0.05, 0.06, 0.06, 0.19, 0.02, 0.2]
    assert replay(free("easycache", threshold=0.2), changes) == "C...C.CC"


def original_fbcache(changes: Sequence[float], threshold: float, allowed: Sequence[bool], most: int) -> str:
    """ComfyUI-Lightning's node: a hit below the threshold where its validator allows one; -1 means unlimited here."""
    hits, strip = 0, ""
    for i, (change, may) in enumerate(zip(changes, allowed, strict=True)):
        hit = i > 0 and change < threshold and may and (most < 0 or hits < most)
        hits = hits + 1 if hit else 0
        strip += "." if hit else "C"
    return strip


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [-1, 0, 1, 3])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.25, 0.75)])
def test_fbcache_equals_the_original_nodes_rule(seed: int, most: int, start: float, end: float) -> None:
    changes = recorded(seed, 28, 0.3)
    allowed = [start <= i / 28 <= end for i in range(28)]
    cache = free(
        "fbcache",
        signal="output",
        relative_to="current",
        threshold=0.15,
        max_consecutive_hits=most,
        start=start,
        end=end,
    )
    found = replay(cache, [None, *changes[1:]])
    assert found == original_fbcache(changes, 0.15, allowed, most)
    assert most == 0 or "." in found


def test_mbcache_gives_each_block_its_own_threshold() -> None:
    policy = make_policy(free("mbcache", threshold=0.2, thresholds=(0.1, 0.3)), (1, 2, 3, 4))
    here = moments(4)[1]
    # A seam stands after the block of its threshold; blocks beyond the list have the default.
    limits = {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.2}
    for seam, limit in limits.items():
        assert policy.decide(here, limit - 1e-6, seam) is Decision.REUSE
        assert policy.decide(here, limit, seam) is Decision.COMPUTE


@pytest.mark.parametrize("change", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["fbcache", "mbcache", "teacache", "easycache"])
def test_a_change_that_is_not_known_is_never_small(method: str, change: float | None) -> None:
    policy = make_policy(free(method, threshold=10.0), (1,))
    assert policy.decide(moments(4)[2], change, 1) is Decision.COMPUTE
    policy.settled(moments(4)[2], Decision.COMPUTE)
    assert policy.decide(moments(4)[3], 0.0, 1) is Decision.REUSE  # and it leaves nothing behind


def diffusers_magcache(ratios: Sequence[float], count: int, threshold: float, most: int, retention: float) -> str:
    """diffusers' MagCacheHeadHook: the same product, error and counter, over ratios stretched by nearest neighbour."""
    scale = (len(ratios) - 1) / (count - 1)
    near = [ratios[int(np.round(np.float32(i) * np.float32(scale)))] for i in range(count)]
    product, error, skipped, known, strip = 1.0, 0.0, 0, False, ""
    for i in range(count):
        compute = True
        if i >= int(retention * count + 0.5):
            product *= near[i]
            skipped += 1
            error += abs(1.0 - product)
            if known and error <= threshold and skipped <= most:
                compute = False
            else:
                product, error, skipped = 1.0, 0.0, 0
        known = True
        strip += "C" if compute else "."
    return strip


@pytest.mark.parametrize("count", [12, 20, 28, 50])
@pytest.mark.parametrize("threshold", [0.011, 0.03, 0.06, 0.24])
@pytest.mark.parametrize("most", [1, 3, 5])
def test_magcache_equals_diffusers_rule(count: int, threshold: float, most: int) -> None:
    retention = round(0.2 * count) / count
    cache = Cache(
        method="magcache",
        ratios=tuple(FLUX_RATIOS),
        threshold=threshold,
        max_consecutive_hits=most,
        start=retention,
        last=False,
    )
    assert replay(cache, [None] * count) == diffusers_magcache(FLUX_RATIOS, count, threshold, most, retention)


def test_magcache_at_threshold_zero_computes_even_where_nothing_changes() -> None:
    assert replay(Cache(method="magcache", ratios=(1.0,), threshold=0.0), [None] * 6) == "C" * 6


def fulls(strip: str) -> list[int]:
    return [i for i, letter in enumerate(strip) if letter == "C"]


def test_an_interval_computes_every_nth() -> None:
    assert fulls(replay(free("interval", every=4), [None] * 20)) == [0, 4, 8, 12, 16]
    assert fulls(replay(Cache(method="interval", every=4), [None] * 20)) == [0, 4, 8, 12, 16, 19]
    assert replay(free("interval", every=1), [None] * 5) == "CCCCC"


def test_taylorseers_warm_up_is_a_start() -> None:
    # FLUX in TaylorSeer's own repository: full at 0, 1, 2, then every 6th: 10 of 50.
    found = fulls(replay(Cache(method="interval", every=6, start=0.06, last=False), [None] * 50))
    assert found == [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]


def spectrum(count: int, warm_up: int, window: float, alpha: float) -> list[int]:
    """Spectrum: after the warm-up every floor(window)-th step is full, and each makes the window wider."""
    found, cached = list(range(warm_up)), 0
    for step in range(warm_up, count):
        if (cached + 1) % math.floor(window) == 0:
            found.append(step)
            window += alpha
            cached = 0
        else:
            cached += 1
    return found


@pytest.mark.parametrize("count", [20, 28, 50, 100])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.75, 3.0])
def test_a_growing_interval_equals_spectrums_rule(count: int, alpha: float) -> None:
    cache = Cache(method="interval", every=2, growth=alpha, start=5 / count, last=False)
    assert fulls(replay(cache, [None] * count)) == spectrum(count, 5, 2.0, alpha)


def test_spectrums_published_setting_has_14_fulls_of_50() -> None:
    found = fulls(replay(Cache(method="interval", every=2, growth=0.75, start=0.1, last=False), [None] * 50))
    assert found == [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46]


def test_a_schedule_computes_exactly_its_steps() -> None:
    assert fulls(replay(free("schedule", steps=(0, 3, 4)), [None] * 8)) == [0, 3, 4]
    assert fulls(replay(Cache(method="schedule", steps=(3, 4)), [None] * 8)) == [0, 3, 4, 7]


@pytest.mark.parametrize("intervals", [1, 2, 8, 20, 28, 50, 100])
def test_a_stretched_schedule_keeps_its_ends_and_its_order(intervals: int) -> None:
    steps = frozenset({0, 1, 2, 5, 9, 14, 20, 27})
    found = stretched(steps, 28, intervals)
    assert {0, intervals - 1} <= found
    assert max(found) == intervals - 1 and min(found) == 0
    assert len(found) == (intervals if intervals < 12 else min(intervals, round(8 * (intervals / 28) ** 0.5)))
    if intervals >= 20:  # dense where the list is dense: early
        assert sorted(found)[1] - sorted(found)[0] < sorted(found)[-1] - sorted(found)[-2]
    assert stretched(steps, 28, 28) == steps
    assert stretched(steps, 0, intervals) == steps


def test_a_stretched_schedule_is_what_the_policy_follows() -> None:
    assert fulls(replay(free("schedule", steps=(0, 2, 4), of=5), [None] * 20)) == [0, 4, 8, 11, 15, 19]


def test_a_run_too_short_for_a_list_is_computed_in_full_and_says_why() -> None:
    policy = make_policy(Cache(method="schedule", steps=(0, 2, 4), of=28), (1,))
    moments = [Moment(i, i, 4, 1 - i / 4) for i in range(4)]
    assert not any(policy.rule.reuse(moment, None, 0) for moment in moments)
    assert policy.rule.why(None, 0) == "a list of 28 steps is followed from 12 steps on (fewer: cache.method interval)"


def why(cache: Cache, interval: int, intervals: int, sigma: float = 0.5, index: int = 9) -> str | None:
    return make_policy(cache, (1,)).forced(Moment(index, interval, intervals, sigma))


@pytest.mark.parametrize("intervals", [10, 20, 30, 50])
def test_start_and_end_are_fractions_of_the_intervals(intervals: int) -> None:
    cache = free("fbcache", start=0.1, end=0.8)
    reasons = [why(cache, i, intervals) for i in range(intervals)]
    tenth = intervals // 10
    assert reasons == ["before start"] * tenth + [None] * (7 * tenth + 1) + ["after end"] * (2 * tenth - 1)


def test_sigma_start_and_sigma_end_speak_of_sigmas() -> None:
    cache = free("fbcache", sigma_start=0.8, sigma_end=0.2)
    assert [why(cache, 5, 10, sigma) for sigma in (0.9, 0.8, 0.5, 0.2, 0.1)] == [
        "before start",
        None,
        None,
        None,
        "after end",
    ]


def test_first_and_last_are_computed_unless_asked_otherwise() -> None:
    assert replay(Cache(method="fbcache"), [0.0] * 6) == "C....C"
    assert replay(Cache(method="fbcache", first=False), [0.0] * 6) == ".....C"
    assert replay(Cache(method="fbcache", last=False), [0.0] * 6) == "C....."
    assert replay(free("fbcache"), [0.0] * 6) == "......"
    assert why(Cache(method="fbcache"), 3, 10, index=0) == "first"  # of what is run, wherever it starts


@pytest.mark.parametrize(
    ("most", "strip"), [(-1, "C........"), (0, "CCCCCCCCC"), (1, "C.C.C.C.C"), (2, "C..C..C.."), (20, "C........")]
)
def test_consecutive_hits_are_limited_and_minus_one_means_unlimited(most: int, strip: str) -> None:
    assert replay(Cache(method="fbcache", last=False, max_consecutive_hits=most), [0.0] * 9) == strip


@pytest.mark.parametrize("method", ["fbcache", "mbcache", "teacache", "easycache", "magcache", "interval", "schedule"])
def test_limits_hold_for_every_method(method: str) -> None:
    extra: dict[str, Any] = {"magcache": {"ratios": (1.0,)}, "schedule": {"steps": (0,)}, "interval": {"every": 99}}
    changes: list[float | None] = [0.0] * 12
    coefficients = {"coefficients": (1.0, 0.0)} if method == "teacache" else {}
    cache = Cache(method=method, start=0.25, end=0.75, max_consecutive_hits=2, **coefficients, **extra.get(method, {}))
    assert replay(cache, changes) == "CCC..C..C.CC"


def test_no_cache_never_reuses() -> None:
    assert replay(free("none"), [0.0] * 5) == "CCCCC"


def test_only_methods_that_measure_ask_for_a_change() -> None:
    settings: dict[str, Any] = {"magcache": {"ratios": (1.0,)}, "schedule": {"steps": (0,)}}
    needs = {
        m: make_policy(Cache(method=m, **settings.get(m, {})), ()).needs_change for m in ("none", "interval", *settings)
    }
    assert needs == {"none": False, "interval": False, "magcache": False, "schedule": False}
    assert all(make_policy(Cache(method=m), (1,)).needs_change for m in ("fbcache", "mbcache", "teacache", "easycache"))


def test_a_late_run_reads_lists_and_tables_at_its_place_in_the_whole() -> None:
    late = [Moment(i, i, 4, 0.4 - i / 10, before=4) for i in range(4)]
    listed = make_policy(free("schedule", steps=(0, 5, 7), of=8), (0,))
    assert [listed.decide(moment, None) is Decision.COMPUTE for moment in late] == [False, True, False, True]
    ratios = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0, 1.0)
    table = make_policy(free("magcache", ratios=ratios, threshold=0.5), (0,))
    assert [table.decide(moment, None) is Decision.COMPUTE for moment in late[:3]] == [False, False, True]
