"""predict.py says WHAT stands in: one weight for each remembered delta. It sees sigmas, never tensors.

Holding the last delta, extrapolating a polynomial and a Chebyshev regression are all rows of numbers, so the
tensor work behind every one of them is the same weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from hasten.moment import Moment, Timeline
from hasten.policy import planned
from hasten.recipe import Cache

# Told in a few words what of a recipe does not fit the run.
Note = Callable[[str], None]


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


class Damped:
    """Trends trusted near by and let go far away.

    hold + a (line - hold) + a/2 (parabola - line), a = exp(-(d/reach)^2). d: how far sigma has fallen since the newest
    delta; reach: where a trend is worth 1/e. At d = 0 this is half a parabola, half a line, which overshoots less than
    either; far away it is the newest delta as it is, which errs by what the delta moves and no more.
    Damped trends: Gardner and McKenzie, Management Science 31 (1985).
    """

    window = 3

    def __init__(self, reach: float) -> None:
        self.reach = reach

    def weights(self, past_sigmas: Sequence[float], moment: Moment) -> list[float]:
        held, line, bent = (newton_weights(past_sigmas, moment.sigma, order) for order in (0, 1, 2))
        trust = math.exp(-(((past_sigmas[-1] - moment.sigma) / self.reach) ** 2))
        return [h + trust * (x - h + 0.5 * (b - x)) for h, x, b in zip(held, line, bent, strict=True)]


class Fitted:
    """Weights fitted to one run, a row for each reused step in order, newest delta last.

    A row stands for the very deltas that it was fitted on: where the run's history is another one (it began late, was
    forced to compute, has another number of steps), the newest delta is held, and `note` is told why, once.
    """

    def __init__(
        self, rows: Sequence[Sequence[float]], timeline: Timeline, computed: Sequence[bool], note: Note, *, of: int = 0
    ) -> None:
        """computed: for each step of the whole schedule, whether it is computed. of: how many steps the fit had."""
        self.timeline, self.note = timeline, note
        reused = [step for step, whether in enumerate(computed) if not whether]
        self.rows: dict[int, list[float]] = {}
        self.past: dict[int, list[int]] = {}
        if of not in (0, len(computed)):
            # A list for another number of steps is stretched; what was fitted to its steps is not.
            note(f"cache.weights were fitted to a run of {of} steps, not {len(computed)}: the newest delta is held")
        elif len(rows) != len(reused):
            note(
                f"cache.weights has {len(rows)} rows and this run reuses {len(reused)} of its {len(computed)} steps: "
                "they were fitted to another run, so the newest delta is held"
            )
        else:
            self.rows = {step: list(row) for step, row in zip(reused, rows, strict=True)}
            self.past = {step: [s for s in range(step) if computed[s]] for step in reused}
        self.window = max(map(len, self.rows.values()), default=1)

    def weights(self, past_sigmas: Sequence[float], moment: Moment) -> list[float]:
        count = len(past_sigmas)
        if self.rows:
            row = self.rows.get(moment.step)
            if row is not None and self._fits(row, past_sigmas, moment):
                return [0.0] * (count - len(row)) + row
            self.note("a row of cache.weights did not fit what this run had computed: the newest delta was held")
        return newton_weights(past_sigmas, moment.sigma, 0)

    def _fits(self, row: Sequence[float], past_sigmas: Sequence[float], moment: Moment) -> bool:
        sigmas, before = self.timeline.sigmas, self.timeline.before
        fitted_on = [step - before for step in self.past[moment.step][-len(row) :]]
        return (
            len(fitted_on) == len(row)
            and fitted_on[0] >= 0
            and [sigmas[i] for i in fitted_on] == list(past_sigmas[-len(row) :])
            and moment.sigma == sigmas[moment.interval]
        )


def make_predictor(cache: Cache, timeline: Timeline, note: Note = lambda text: None) -> Predictor:
    """The predictor that `cache` asks for, for a run along `timeline`. note: told what does not fit the run."""
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
    if cache.predictor == "damped":
        return Damped(cache.reach)
    if cache.predictor == "weights":
        return Fitted(cache.weights, timeline, planned(cache, timeline), note, of=cache.of)
    return Hold()
