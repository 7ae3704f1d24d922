"""Every row of the table: which method at which knob. It names settings; how they are measured is measuring.py's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fitting import Calibration, fitted_weights
from measuring import Method
from peers import Peer
from rivals import FewerSteps

import hasten


@dataclass(frozen=True)
class Accelerated:
    """One of our own recipes, by name or as its [cache] and [skip] sections."""

    recipe: str | Mapping[str, Any]
    steps: int | None = None

    @contextmanager
    def on(self, pipe: Any) -> Iterator[Any]:
        """hasten.accelerate's context."""
        with hasten.accelerate(pipe, self.recipe) as run:
            yield run


@dataclass(frozen=True)
class Row:
    """A line of the table before it is measured. make: gives the method once the model was calibrated.

    process: "" for this process, or the library whose child process runs it.
    guess: evaluations expected, for the estimate of the time alone.
    """

    method: str
    knob: str
    predictor: str
    make: Callable[[Calibration], Method]
    guess: float = 12.0
    process: str = ""

    @property
    def name(self) -> str:
        """What --only is matched against."""
        return f"{self.method}/{self.knob}/{self.predictor}"


# Dense where the flow bends: at the beginning, where the scene is laid out, and at the end, where edges form.
SHAPED = {
    14: (0, 1, 2, 4, 6, 8, 10, 13, 16, 19, 22, 24, 26, 27),
    11: (0, 1, 2, 4, 7, 10, 14, 18, 22, 25, 27),
    9: (0, 1, 3, 6, 10, 15, 20, 25, 27),
    7: (0, 1, 4, 9, 15, 22, 27),
}
PREDICTORS: Mapping[str, Mapping[str, Any]] = {
    "hold": {},
    "taylor1": {"predictor": "taylor", "order": 1},
    "taylor2": {"predictor": "taylor", "order": 2},
    "chebyshev": {"predictor": "chebyshev"},
}


def all_rows(steps: int) -> list[Row]:
    """The whole table for an uncached run of `steps`, in the order in which it is measured."""
    return [
        Row("none", "", "", lambda _: FewerSteps(steps), guess=steps),
        *_fewer_steps(steps),
        *(_ours("recipe", name, _predictor_of(name), name) for name in hasten.recipe_names()),
        *_gated(),
        *_intervals(),
        *_inside_blocks(),
        *_schedules(steps),
        *_skips(steps),
        *_diffusers_rows(steps),
        *_cache_dit_rows(steps),
    ]


def _ours(method: str, knob: str, predictor: str, recipe: str | Mapping[str, Any], guess: float = 12.0) -> Row:
    return Row(method, knob, predictor, lambda _: Accelerated(recipe), guess=guess)


def _cache(**cache: Any) -> dict[str, Any]:
    return {"schema": 1, "cache": cache}


def _predictor_of(name: str) -> str:
    cache = hasten.Recipe.load(name).cache
    return f"taylor{cache.order}" if cache.predictor == "taylor" else cache.predictor


def _fewer_steps(steps: int) -> Iterator[Row]:
    counts = {"euler": (20, 16, 14, 12, 11, 10, 9, 8, 7, 6), "adams-bashforth 2": (14, 9), "dpm++ 2m": (14, 11, 9, 7)}
    for solver, of_solver in counts.items():
        for count in of_solver:
            if count < steps:
                yield Row("fewer steps", f"steps={count}", solver, lambda _, c=count, s=solver: FewerSteps(c, s), count)


def _gated() -> Iterator[Row]:
    for signal, predictor, thresholds in (
        ("residual", "hold", (0.08, 0.15, 0.3)),
        ("residual", "taylor1", (0.08, 0.15, 0.3)),
        ("residual", "taylor2", (0.15, 0.3)),
        ("output", "hold", (0.06, 0.12)),
    ):
        for threshold in thresholds:
            recipe = _cache(method="fbcache", signal=signal, threshold=threshold, **PREDICTORS[predictor])
            name = "fbcache" if signal == "residual" else "fbcache output"
            yield _ours(name, f"threshold={threshold}", predictor, recipe)
    for predictor, thresholds in (("hold", (0.1, 0.2)), ("taylor1", (0.2,))):
        for threshold in thresholds:
            recipe = _cache(method="mbcache", threshold=threshold, **PREDICTORS[predictor])
            yield _ours("mbcache", f"threshold={threshold}", predictor, recipe)
    for threshold in (0.25, 0.6):
        yield _ours("teacache", f"threshold={threshold}", "hold", _cache(method="teacache", threshold=threshold))
    for threshold, predictor in ((0.2, "hold"), (0.4, "hold"), (0.4, "taylor1")):
        # FLUX's polynomial was fitted to FLUX.1-dev: the plain sum of changes stands beside it.
        recipe = _cache(method="teacache", threshold=threshold, coefficients=[1.0, 0.0], **PREDICTORS[predictor])
        yield _ours("teacache plain", f"threshold={threshold}", predictor, recipe)
    for threshold, predictor in ((0.05, "hold"), (0.15, "hold"), (0.15, "taylor1")):
        recipe = _cache(method="easycache", threshold=threshold, **PREDICTORS[predictor])
        yield _ours("easycache", f"threshold={threshold}", predictor, recipe)
    for threshold, predictor in ((0.06, "hold"), (0.24, "hold"), (0.24, "taylor1")):
        yield Row("magcache", f"threshold={threshold}", predictor, _magcache(threshold, predictor))


def _magcache(threshold: float, predictor: str) -> Callable[[Calibration], Method]:
    def make(measured: Calibration) -> Method:
        ratios = list(measured.ratios)
        return Accelerated(_cache(method="magcache", threshold=threshold, ratios=ratios, **PREDICTORS[predictor]))

    return make


def _intervals() -> Iterator[Row]:
    for predictor, settings in (
        ("hold", ((2, 0.0), (3, 0.0))),
        ("taylor1", ((2, 0.0), (3, 0.0), (4, 0.0))),
        ("taylor2", ((2, 0.0), (3, 0.0), (4, 0.0), (5, 0.0), (7, 0.0))),
        ("chebyshev", ((2, 0.0), (3, 0.0), (4, 0.0))),
    ):
        for every, start in settings:
            recipe = _cache(method="interval", every=every, start=start, **PREDICTORS[predictor])
            yield _ours("interval", f"every={every}", predictor, recipe, 28 / every + 2)
    for every, start in ((3, 0.1), (4, 0.1), (5, 0.1), (4, 0.2)):
        recipe = _cache(method="interval", every=every, start=start, **PREDICTORS["taylor2"])
        yield _ours("interval warm", f"every={every} start={start}", "taylor2", recipe, 28 / every + 4)
    for growth, predictor in ((0.25, "chebyshev"), (0.75, "chebyshev"), (0.25, "taylor2"), (0.75, "taylor2")):
        recipe = _cache(method="interval", every=2, growth=growth, **PREDICTORS[predictor])
        yield _ours("spectrum", f"growth={growth}", predictor, recipe, 10)


def _inside_blocks() -> Iterator[Row]:
    """Three full evaluations first and the last one full, as these methods have it; span rows with that schedule."""
    for every, score in ((2, "attention"), (3, "attention"), (4, "attention"), (2, "age"), (4, "age")):
        recipe = {**_cache(method="toca", every=every), "tokens": {"score": score, "record": False}}  # counted on a GPU
        yield _ours("toca", f"every={every} score={score}", "hold", recipe, 28 / every + 4)
    for every in (3, 4):  # with 2 there is one between, and that is ToCa's
        recipe = {**_cache(method="duca", every=every), "tokens": {"score": "random", "record": False}}
        yield _ours("duca", f"every={every} score=random", "hold", recipe, 28 / every + 4)
    for method, warm in (("modules", {}), ("interval", {"start": 3 / 28})):
        name = "modules" if method == "modules" else "interval warm 3"
        for predictor, each in (("hold", (2, 3)), ("taylor1", (2, 3)), ("taylor2", (2, 3, 4, 5))):
            for every in each:
                recipe = _cache(method=method, every=every, **warm, **PREDICTORS[predictor])
                yield _ours(name, f"every={every}", predictor, recipe, 28 / every + 3)


def _schedules(steps: int) -> Iterator[Row]:
    for count, shaped in SHAPED.items():
        even = sorted({round(i * (steps - 1) / (count - 1)) for i in range(count)})
        recipe = _cache(method="schedule", steps=even, **PREDICTORS["taylor2"])
        yield _ours("schedule even", f"computed={count}", "taylor2", recipe, count)
        recipe = _cache(method="schedule", steps=list(shaped), of=28, **PREDICTORS["taylor2"])
        yield _ours("schedule", f"computed={count}", "taylor2", recipe, count)
        yield Row("schedule", f"computed={count}", "fitted", _fitted(shaped), count)


def _fitted(schedule: Sequence[int]) -> Callable[[Calibration], Method]:
    def make(measured: Calibration) -> Method:
        scale = (len(measured.sigmas) - 1) / 27
        steps = sorted({round(step * scale) for step in schedule})
        weights = fitted_weights(measured, steps, window=4, pull=1e-4)
        return Accelerated(_cache(method="schedule", steps=steps, predictor="weights", weights=weights))

    return make


def _skips(steps: int) -> Iterator[Row]:
    for single in ([3], [3, 7]):  # not the middle one, at which evaluations are counted
        recipe = {"schema": 1, "skip": {"single": single}}
        yield _ours("block skip", "single=" + "+".join(map(str, single)), "", recipe, steps)


def _diffusers_rows(steps: int) -> Iterator[Row]:
    def row(method: str, knob: str, predictor: str, kind: str, **options: Any) -> Row:
        peer = Peer("diffusers", kind, options)
        return Row(f"diffusers {method}", knob, predictor, lambda _: peer, process="diffusers")

    for threshold in (0.08, 0.15, 0.3):
        yield row("FirstBlockCache", f"threshold={threshold}", "hold", "fbcache", threshold=threshold)
    for interval in (2, 3, 4):
        yield row("TaylorSeer lite", f"interval={interval}", "taylor1", "taylorseer",
                  cache_interval=interval, max_order=1, use_lite_mode=True)  # fmt: skip
    yield row("TaylorSeer lite", "interval=3", "taylor2", "taylorseer",
              cache_interval=3, max_order=2, use_lite_mode=True)  # fmt: skip
    for interval in (2, 3, 4):
        yield row("TaylorSeer", f"interval={interval}", "taylor1", "taylorseer", cache_interval=interval, max_order=1)
    for threshold in (0.06, 0.24):
        yield Row(
            "diffusers MagCache",
            f"threshold={threshold}",
            "hold",
            _peer_magcache(threshold, steps),
            process="diffusers",
        )


def _peer_magcache(threshold: float, steps: int) -> Callable[[Calibration], Method]:
    def make(measured: Calibration) -> Method:
        options = {"threshold": threshold, "num_inference_steps": steps, "mag_ratios": list(measured.ratios)}
        return Peer("diffusers", "magcache", options)

    return make


def _cache_dit_rows(steps: int) -> Iterator[Row]:
    def row(knob: str, predictor: str, **options: Any) -> Row:
        peer = Peer("cache-dit", predictor, options)
        return Row("cache-dit DBCache", knob, predictor, lambda _: peer, process="cache-dit")

    # Its warm-up of 8 steps would leave no half of 28 to reuse: 3, as TaylorSeer's own, for all.
    for blocks, threshold in ((1, 0.15), (1, 0.3), (2, 0.3)):
        knob = f"F{blocks}B0 threshold={threshold}"
        yield row(knob, "hold", Fn_compute_blocks=blocks, residual_diff_threshold=threshold, max_warmup_steps=3)
    for predictor in ("taylor1", "taylor2", "foca", "dmd"):
        yield row("F1B0 threshold=0.3", predictor, Fn_compute_blocks=1, residual_diff_threshold=0.3, max_warmup_steps=3)
