"""Predictors on paper: exact where they should be, equal to their formulas, finite, and holding when that is all."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from hasten.moment import Moment, Timeline
from hasten.predict import Chebyshev, Damped, Hold, Predictor, Taylor, chebyshev_weights, make_predictor, newton_weights
from hasten.recipe import Cache


def at(sigma: float, interval: int = 0, intervals: int = 10) -> Moment:
    return Moment(0, interval, intervals, sigma)


def uneven(rng: random.Random, count: int) -> list[float]:
    """Falling sigmas in (0, 1), some close together."""
    while True:
        sigmas = sorted((rng.uniform(0.05, 1.0) for _ in range(count)), reverse=True)
        if all(a - b > 1e-3 for a, b in pairwise(sigmas)):
            return sigmas


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("order", [0, 1, 2])
def test_taylor_is_exact_on_polynomials_at_uneven_sigmas(order: int, seed: int) -> None:
    rng = random.Random(seed)
    *past, sigma = uneven(rng, rng.randrange(order + 2, 9))
    polynomial = [rng.uniform(-3, 3) for _ in range(order + 1)]
    weights = newton_weights(past, sigma, order)
    predicted = np.dot(weights, np.polyval(polynomial, past))
    assert predicted == pytest.approx(np.polyval(polynomial, sigma), rel=1e-9, abs=1e-9 * np.abs(weights).sum())
    assert all(weight == 0.0 for weight in weights[: len(past) - order - 1])


def test_taylor_is_not_exact_beyond_its_order() -> None:
    past, sigma = [1.0, 0.7, 0.5], 0.3
    assert np.dot(newton_weights(past, sigma, 1), np.square(past)) != pytest.approx(sigma**2, abs=1e-3)


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_deltas_lower_the_degree(count: int) -> None:
    past = [0.9, 0.6][:count]
    assert newton_weights(past, 0.3, 2) == newton_weights(past, 0.3, count - 1)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("ridge", [0.1, 0.001, 10.0])
def test_chebyshev_equals_its_normal_equations_in_float64(seed: int, ridge: float) -> None:
    rng = random.Random(seed)
    *past, sigma = uneven(rng, rng.randrange(3, 12))
    degree = rng.randrange(1, 6)
    # Written out by hand: T_k by its recurrence, then (X^T X + ridge I) c = X^T y for a random y.
    x = np.array([recurrence(2 * s - 1.0, degree) for s in past])
    y = np.array([rng.uniform(-2, 2) for _ in past])
    coefficients = np.linalg.solve(x.T @ x + ridge * np.eye(degree + 1), x.T @ y)
    weights = chebyshev_weights(past, sigma, degree=degree, ridge=ridge, low=0.0, high=1.0)
    assert np.dot(weights, y) == pytest.approx(recurrence(2 * sigma - 1.0, degree) @ coefficients, rel=1e-9, abs=1e-9)


def recurrence(tau: float, degree: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    terms = [1.0, tau]
    while len(terms) <= degree:
        terms.append(2 * tau * terms[-1] - terms[-2])
    return np.array(terms[: degree + 1], dtype=np.float64)


def test_without_a_ridge_enough_deltas_give_the_polynomial_back() -> None:
    past = [1.0, 0.9, 0.7, 0.5, 0.45, 0.3]
    weights = chebyshev_weights(past, 0.2, degree=3, ridge=0.0, low=0.0, high=1.0)
    assert np.dot(weights, np.polyval([1.0, -2.0, 0.5, 3.0], past)) == pytest.approx(np.polyval([1, -2, 0.5, 3], 0.2))


PREDICTORS: list[Predictor] = [
    Hold(),
    Taylor(0),
    Taylor(1),
    Taylor(2),
    Damped(0.15),
    Chebyshev(degree=4, ridge=0.1, blend=0.5, window=10, low=0.0, high=1.0),
    Chebyshev(degree=8, ridge=0.0, blend=1.0, window=16, low=0.0, high=1.0),
    make_predictor(
        Cache(
            method="schedule", steps=(0, 2), last=False, predictor="weights", weights=((0.2,), (-1.0, 2.0), (0.5, 0.5))
        ),
        Timeline([1.0, 0.8, 0.6, 0.4, 0.2, 0.0]),
    ),
]


@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda p: type(p).__name__)
def test_one_delta_is_held(predictor: Predictor) -> None:
    assert predictor.weights([0.8], at(0.5, interval=3)) == [1.0]


@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("count", range(1, 17))
def test_weights_are_finite_and_one_for_each_delta(predictor: Predictor, count: int) -> None:
    past = uneven(random.Random(count), count)
    weights = predictor.weights(past, at(0.01, interval=5))
    assert len(weights) == count
    assert np.isfinite(weights).all()
    assert all(isinstance(weight, float) for weight in weights)


@pytest.mark.parametrize("predictor", PREDICTORS[:6], ids=lambda p: type(p).__name__)
def test_what_does_not_change_is_predicted_to_stay(predictor: Predictor) -> None:
    # A ridge shrinks towards 0, so Chebyshev keeps it only nearly.
    assert sum(predictor.weights([0.9, 0.8, 0.6, 0.5], at(0.45))) == pytest.approx(1.0, abs=0.05)


def test_a_damped_trend_is_half_a_parabola_near_by_and_the_newest_delta_far_away() -> None:
    past = [0.9, 0.8, 0.6]
    near = Damped(1e6).weights(past, at(0.45))
    line, bent = newton_weights(past, 0.45, 1), newton_weights(past, 0.45, 2)
    assert near == pytest.approx([(x + b) / 2 for x, b in zip(line, bent, strict=True)])
    assert Damped(0.01).weights(past, at(0.45)) == pytest.approx([0.0, 0.0, 1.0])
    # At one reach the trend is worth 1/e: of a straight line 1/e of the way is gone.
    value = sum(w * (1 - s) for w, s in zip(Damped(0.15).weights(past[1:], at(0.45)), past[1:], strict=True))
    assert value == pytest.approx(0.4 + 0.15 / np.e)


def test_blend_is_the_share_of_chebyshev() -> None:
    past, here = [0.9, 0.8, 0.6, 0.5], at(0.45)
    settings = {"degree": 3, "ridge": 0.1, "window": 10, "low": 0.0, "high": 1.0}
    none, half, full = (Chebyshev(blend=blend, **settings).weights(past, here) for blend in (0.0, 0.5, 1.0))  # type: ignore[arg-type]
    assert none == newton_weights(past, 0.45, 1)
    assert full == pytest.approx(chebyshev_weights(past, 0.45, degree=3, ridge=0.1, low=0.0, high=1.0))
    assert half == pytest.approx([(a + b) / 2 for a, b in zip(none, full, strict=True)])


LINE = Timeline([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def fitted(rows: Sequence[Sequence[float]], *, timeline: Timeline = LINE, **cache: Any) -> tuple[Predictor, list[str]]:
    """The predictor of a recipe with those rows, and what it notes."""
    notes: list[str] = []
    settings: dict[str, Any] = {"steps": (0, 2), "last": False, **cache}
    wanted = Cache(method="schedule", predictor="weights", weights=tuple(map(tuple, rows)), **settings)
    return make_predictor(wanted, timeline, notes.append), notes


def late(interval: int, sigma: float) -> Moment:
    return Moment(interval, interval, 5, sigma)


def test_fitted_weights_belong_to_their_steps() -> None:
    predictor, notes = fitted([[2.0], [-1.0, 2.0], [0.5, 0.25]])
    assert predictor.window == 2
    assert predictor.weights([1.0], late(1, 0.8)) == [2.0]
    assert predictor.weights([1.0, 0.6], late(3, 0.4)) == [-1.0, 2.0]
    assert predictor.weights([1.0, 0.6], late(4, 0.2)) == [0.5, 0.25]
    assert notes == []


@pytest.mark.parametrize(
    ("past", "interval", "sigma"),
    [
        ([0.6], 3, 0.4),  # begun late: fewer deltas than the fit had
        ([1.0, 0.8], 3, 0.4),  # another decision was taken before
        ([0.8, 0.6], 3, 0.4),
        ([1.0, 0.6], 3, 0.35),  # between two steps
        ([1.0], 2, 0.6),  # a reuse that was not fitted
    ],
)
def test_a_row_that_does_not_fit_the_history_is_held_and_said(past: list[float], interval: int, sigma: float) -> None:
    predictor, notes = fitted([[2.0], [-1.0, 2.0], [0.5, 0.25]])
    assert predictor.weights(past, late(interval, sigma)) == [*[0.0] * (len(past) - 1), 1.0]
    assert len(notes) == 1 and "did not fit" in notes[0]


def test_rows_for_another_number_of_steps_are_held_and_said() -> None:
    for cache in ({}, {"of": 28}):
        predictor, notes = fitted([[2.0], [3.0]] if not cache else [[2.0], [3.0], [4.0]], **cache)
        assert predictor.weights([1.0], late(1, 0.8)) == [1.0] and predictor.window == 1
        assert len(notes) == 1 and ("a run of 28 steps, not 5" if cache else "fitted to another run") in notes[0]
    predictor, notes = fitted([[2.0]] * 24, timeline=Timeline([1.0, 0.5, 0.0]))  # a warm-up of two steps
    assert predictor.weights([1.0], Moment(1, 1, 2, 0.5)) == [1.0] and len(notes) == 1


@pytest.mark.parametrize(
    ("limits", "reused"),
    [
        ({"last": True}, [1, 3]),
        ({"start": 0.4}, [3, 4]),  # step 1 begins at a fifth of the way
        ({"end": 0.5}, [1]),
        ({"sigma_start": 0.7}, [3, 4]),
        ({"sigma_end": 0.3}, [1, 3]),
        ({"max_consecutive_hits": 1}, [1, 3]),
        ({"first": False, "steps": (1, 2)}, [0, 3, 4]),
    ],
)
def test_rows_are_counted_over_what_the_run_really_reuses(limits: dict[str, Any], reused: list[int]) -> None:
    predictor, notes = fitted([[float(step)] for step in reused], **limits)
    assert notes == []
    computed = [step for step in range(5) if step not in reused]
    for step in reused:
        past = [LINE.sigmas[s] for s in computed if s < step]
        if past:
            assert predictor.weights(past, late(step, LINE.sigmas[step]))[-1] == float(step)
    assert notes == []


def test_rows_are_found_where_a_late_run_stands() -> None:
    timeline = Timeline([0.4, 0.2, 0.1, 0.0], before=3)
    predictor, notes = fitted([[2.0], [3.0], [0.5, 4.0]], timeline=timeline, steps=(0, 2, 4), of=6)
    # Steps 1, 3 and 5 of six are reused; this run begins with step 3.
    assert predictor.weights([0.2], Moment(2, 2, 3, 0.1, before=3)) == [1.0]  # its second delta lies before the run
    assert len(notes) == 1
    predictor, notes = fitted([[2.0], [3.0], [4.0]], timeline=timeline, steps=(0, 2, 4), of=6)
    assert predictor.weights([0.2], Moment(2, 2, 3, 0.1, before=3)) == [4.0] and notes == []


@pytest.mark.parametrize(
    ("cache", "window"),
    [
        (Cache(method="interval"), 1),
        (Cache(method="interval", predictor="taylor", order=2), 3),
        (Cache(method="interval", predictor="taylor", order=0), 1),
        (Cache(method="interval", predictor="chebyshev", window=7), 7),
    ],
)
def test_a_predictor_remembers_what_it_needs_and_no_more(cache: Cache, window: int) -> None:
    assert make_predictor(cache, Timeline([1.0, 0.5, 0.0])).window == window


def test_order_one_equals_cache_dits_taylorseer_at_even_steps() -> None:
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            calibrators = pytest.importorskip("cache_dit.caching.cache_contexts.calibrators.taylorseer")
        finally:
            logging.disable(logging.NOTSET)
    theirs = calibrators.TaylorSeerCalibrator(n_derivatives=1, max_warmup_steps=3, skip_interval_steps=4)
    rng = np.random.default_rng(0)
    curve = rng.normal(size=(20, 5)).cumsum(axis=0)
    sigmas = [1.0 - step / 20 for step in range(20)]
    past: list[int] = []
    reused = 0
    for step in range(20):
        given = torch.tensor(curve[step])
        predicted = theirs.step(given)
        if predicted is given:
            past = [*past, step][-2:]
            continue
        reused += 1
        weights = newton_weights([sigmas[i] for i in past], sigmas[step], 1)
        assert np.dot(weights, curve[past]) == pytest.approx(predicted.numpy(), rel=1e-9)
    assert reused > 8
