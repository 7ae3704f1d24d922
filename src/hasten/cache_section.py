"""cache_section.py: a recipe's [cache], its methods and predictors, and what is allowed.

It knows names, ranges and defaults; what they mean for a run is worked out in plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.values import at_least, between, one_of

METHODS = (
    "none",
    "fbcache",
    "mbcache",
    "teacache",
    "easycache",
    "magcache",
    "interval",
    "schedule",
    "toca",
    "duca",
    "modules",
)
# Those that remember what each module of a block gave out, and refresh or forecast it between full evaluations.
INSIDE_BLOCKS = ("toca", "duca", "modules")
PREDICTORS = ("hold", "taylor", "chebyshev", "damped", "weights")

# Highest power first, as numpy.polyval takes them. Source: TeaCache4FLUX (ali-vilab/TeaCache, 2024).
TEACACHE_FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)

# Where a threshold is left out. fbcache: ParaAttention's middle setting for FLUX; mbcache: the original
# ComfyUI-Lightning node; teacache: its authors' 1.8x setting; easycache: ComfyUI's node; magcache: its authors.
DEFAULT_THRESHOLDS = {
    "fbcache": 0.12,
    "mbcache": 0.25,
    "teacache": 0.4,
    "easycache": 0.2,
    "magcache": 0.06,
}


@dataclass(frozen=True)
class Cache:
    """Settings of the step cache: one row of the table signal, policy, predictor, span.

    Fractions (`start`, `end`) are of the run's intervals, `steps` and `every` are counted in intervals,
    sigmas are the run's own. `compare_with` says which earlier evaluation a signal is held against:
    the last "computed" one, or the "latest" one whether computed or not; `distance` how: the relative "l1" distance
    (`relative_to` names its denominator), or half of one minus the "cosine", which knows no size.
    """

    method: str = "none"
    signal: str = "residual"
    distance: str = "l1"
    relative_to: str = "previous"
    compare_with: str = "auto"
    threshold: float | None = None
    thresholds: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    of: int = 0
    every: int = 4
    growth: float = 0.0
    coefficients: tuple[float, ...] = TEACACHE_FLUX
    ratios: tuple[float, ...] = ()
    start: float = 0.0
    end: float = 1.0
    sigma_start: float | None = None
    sigma_end: float | None = None
    max_consecutive_hits: int = -1
    first: bool = True
    last: bool = True
    predictor: str = "hold"
    order: int = 1
    degree: int = 4
    ridge: float = 0.1
    blend: float = 0.5
    window: int = 10
    reach: float = 0.15
    weights: tuple[tuple[float, ...], ...] = ()
    device: str = "auto"
    dtype: str = "model"

    def threshold_or_default(self) -> float:
        """The threshold, or the method's published one where none is given."""
        return DEFAULT_THRESHOLDS[self.method] if self.threshold is None else self.threshold

    def compares_with_latest(self) -> bool:
        """Whether a signal is compared with the latest evaluation, reused ones included.

        "auto" keeps each published rule: First-Block cache on residuals compares with the last computed
        evaluation (diffusers, ParaAttention); on outputs, as the original ComfyUI-Lightning nodes do, and
        where changes are added up (TeaCache, EasyCache), with the latest.
        """
        if self.compare_with != "auto":
            return self.compare_with == "latest"
        return self.method in ("teacache", "easycache") or self.signal == "output"

    def __post_init__(self) -> None:
        one_of("cache.method", self.method, METHODS)
        one_of("cache.signal", self.signal, ("residual", "output"))
        one_of("cache.distance", self.distance, ("l1", "cosine"))
        one_of("cache.relative_to", self.relative_to, ("previous", "current"))
        one_of("cache.compare_with", self.compare_with, ("auto", "computed", "latest"))
        one_of("cache.predictor", self.predictor, PREDICTORS)
        one_of("cache.device", self.device, ("auto", "cpu"))
        one_of("cache.dtype", self.dtype, ("model", "float32"))
        if self.threshold is not None:
            between("cache.threshold", self.threshold, 0.0, 10.0)
        for value in self.thresholds:
            between("cache.thresholds", value, 0.0, 10.0)
        between("cache.start", self.start, 0.0, 1.0)
        between("cache.end", self.end, 0.0, 1.0)
        if self.start > self.end:
            raise ValueError(
                f"cache.start is {self.start} and cache.end is {self.end}: start must not be after end; swap them."
            )
        if self.sigma_start is not None and self.sigma_end is not None and self.sigma_start < self.sigma_end:
            raise ValueError(
                f"cache.sigma_start is {self.sigma_start} and cache.sigma_end is {self.sigma_end}: sigmas fall, so the "
                "start must not be below the end; swap them."
            )
        at_least("cache.max_consecutive_hits", self.max_consecutive_hits, -1, "-1 means unlimited")
        at_least("cache.every", self.every, 1, "1 computes every evaluation")
        between("cache.growth", self.growth, 0.0, 100.0)
        between("cache.order", self.order, 0, 2)
        between("cache.degree", self.degree, 1, 8)
        between("cache.ridge", self.ridge, 0.0, 1000.0)
        between("cache.blend", self.blend, 0.0, 1.0)
        between("cache.window", self.window, 2, 16)
        between("cache.reach", self.reach, 0.001, 10.0)
        at_least("cache.of", self.of, 0, "0 takes the steps as they are")
        for step in self.steps:
            at_least("cache.steps", step, 0, "steps count from 0")
        if self.of and self.steps and max(self.steps) >= self.of:
            raise ValueError(
                f"cache.steps names step {max(self.steps)} of a run of cache.of = {self.of} steps: "
                f"the largest allowed is {self.of - 1}."
            )
        if self.method == "schedule" and not self.steps:
            raise ValueError(
                "cache.method is schedule but cache.steps is empty: list the steps to compute, such as [0, 1, 4, 8]."
            )
        if self.method == "magcache" and not self.ratios:
            raise ValueError(
                "cache.method is magcache but cache.ratios is empty: measure them with `hasten calibrate`, "
                "or copy a published list for your model."
            )
        if self.method == "teacache" and not self.coefficients:
            raise ValueError("cache.coefficients is empty: leave it out to use FLUX's, highest power first.")
        if self.predictor == "weights" and not self.weights:
            raise ValueError("cache.predictor is weights but cache.weights is empty: give one row for each reuse.")
        if self.weights and self.predictor != "weights":
            raise ValueError(
                f'cache.weights is given but cache.predictor is {self.predictor}: set predictor = "weights".'
            )
        if self.predictor == "weights" and self.method != "schedule":
            raise ValueError(
                f"cache.predictor is weights with cache.method {self.method}: fitted weights belong to a fixed "
                'list of steps; set method = "schedule".'
            )
        if any(not row or len(row) > 16 for row in self.weights):
            raise ValueError("each row of cache.weights takes 1 to 16 numbers, one for each remembered delta.")
