"""predict.py says WHAT stands in: one weight for each remembered delta. It sees sigmas, never tensors.

Holding the last delta, extrapolating a polynomial and a Chebyshev regression are all rows of numbers, so the
tensor work behind every one of them is the same weighted sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from hasten.moment import Moment, Timeline
from hasten.policy import stretched
from hasten.recipe import Cache


class Predictor(Protocol):
    """Scalars from scalars. `window` is how many deltas are worth remembering."""

    window: int

    def weights(self, past_sigmas: Sequence[float], moment: Moment) -> list[float]:
        """One float for each remembered delta, oldest first; past_sigmas are theirs."""


def newton_weights(past_sigmas: Sequence[float], sigma: float, order: int) -> list[float]:
    """Weights of the polynomial of degree `order` through the newest order + 1 deltas, read off at `sigma`.

    Newton's divided differences on the real sigmas, written out per delta (Lagrange's form): exact for polynomials
    up to that degree however uneven the sigmas. Fewer deltas lower the degree; order 0 holds the newest.
    Source: TaylorSeer (arXiv 2503.06923), whose differences assume even steps.
    """
    count = len(past_sigmas)
    points = past_sigmas[-(min(order, count - 1) + 1) :]
    newest = [
        float(np.prod([(sigma - b) / (a - b) for j, b in enumerate(points) if j != i])) for i, a in enumerate(points)
    ]
    return [0.0] * (count - len(points)) + newest


def chebyshev_weights(
    past_sigmas: Sequence[float], sigma: float, *, degree: int, ridge: float, low: float, high: float
) -> list[float]:
    """Weights of a ridge regression on Chebyshev polynomials T_0..T_degree: x*^T (X^T X + ridge I)^-1 X^T.

    low, high: the sigmas that are mapped to -1 and 1. Solved in float64.
    Source: Spectrum (arXiv 2603.01623), there on step indices; here on sigmas.
    """
    tau = 2.0 * (np.asarray([*past_sigmas, sigma], dtype=np.float64) - low) / (high - low) - 1.0
    *x, here = np.polynomial.chebyshev.chebvander(tau, degree)
    # lstsq of the stacked system rather than a solve: with ridge 0 and few deltas X^T X is singular.
    stacked = np.vstack([x, np.sqrt(ridge) * np.eye(degree + 1)])
    solution = np.linalg.pinv(stacked)[:, : len(past_sigmas)]
    return [float(w) for w in here @ solution]


class Hold:
    """The newest delta as it is. Sources: First-Block cache, TeaCache, MagCache."""

    window = 1

    def weights(self, past_sigmas: Sequence[float], moment: Moment) -> list[float]:
        return newton_weights(past_sigmas, moment.sigma, 0)


class Taylor:
    """A polynomial through the newest deltas. Source: TaylorSeer (arXiv 2503.06923)."""

    def __init__(self, order: int) -> None:
        self.order, self.window = order, order + 1

    def weights(self, past_sigmas: Sequence[float], moment: Moment) -> list[float]:
        return newton_weights(past_sigmas, moment.sigma, self.order)


class Chebyshev:
    """A share of Chebyshev regression, the rest first-order Newton. Source: Spectrum (arXiv 2603.01623)."""

    def __init__(self, *, degree: int, ridge: float, blend: float, window: int, low: float, high: float) -> None:
        self.degree, self.ridge, self.blend, self.window = degree, ridge, blend, window
        self.low, self.high = low, high

    def weights(self, past_sigmas: Sequence[float], moment: Moment) -> list[float]:
        near = newton_weights(past_sigmas, moment.sigma, 1)
        if len(past_sigmas) < 2:
            return near
        wide = chebyshev_weights(
            past_sigmas, moment.sigma, degree=self.degree, ridge=self.ridge, low=self.low, high=self.high
        )
        return [self.blend * w + (1.0 - self.blend) * n for w, n in zip(wide, near, strict=True)]


class Fitted:
    """Weights fitted to one schedule, a row for each reused interval in order, newest delta last.

    Raises ValueError when the run reuses another number of intervals than there are rows.
    """

    def __init__(self, rows: Sequence[Sequence[float]], reused: Sequence[int]) -> None:
        if len(rows) != len(reused):
            raise ValueError(
                f"cache.weights has {len(rows)} rows, and this run reuses {len(reused)} of its steps: the weights were "
                "fitted to a run of another length; use that number of steps, or another predictor."
            )
        self.rows = {interval: list(row) for interval, row in zip(reused, rows, strict=True)}
        self.window = max(len(row) for row in rows)

    def weights(self, past_sigmas: Sequence[float], moment: Moment) -> list[float]:
        count = len(past_sigmas)
        row = self.rows.get(moment.interval)
        if row is None or len(row) > count:  # a run that was begun late has fewer deltas than the fit had
            return newton_weights(past_sigmas, moment.sigma, 0)
        return [0.0] * (count - len(row)) + row


def make_predictor(cache: Cache, timeline: Timeline) -> Predictor:
    """The predictor that `cache` asks for, for a run along `timeline`."""
    if cache.predictor == "taylor":
        return Taylor(cache.order)
    if cache.predictor == "chebyshev":
        return Chebyshev(
            degree=cache.degree,
            ridge=cache.ridge,
            blend=cache.blend,
            window=cache.window,
            low=timeline.sigmas[-1],
            high=timeline.sigmas[0],
        )
    if cache.predictor == "weights":
        computed = stretched(frozenset(cache.steps), cache.of, timeline.intervals)
        # First and last are computed whatever the list says, unless asked otherwise.
        always = ({0} if cache.first else set()) | ({timeline.intervals - 1} if cache.last else set())
        reused = [i for i in range(timeline.intervals) if i not in computed and i not in always]
        return Fitted(cache.weights, reused)
    return Hold()
