"""unused.py finds settings of a recipe that its method, its predictor or its attention takes no notice of.

They are no error, for a threshold may be kept while methods are tried out; but the report says it, so that nobody turns
a knob that is connected to nothing.
"""

from __future__ import annotations

from dataclasses import fields

from hasten.recipe import Attention, Cache

MEASURED = ("fbcache", "mbcache", "teacache", "easycache", "magcache")
# Which methods look at a setting; those of no single method are not here.
TAKEN_BY = {
    "threshold": MEASURED,
    "thresholds": ("mbcache",),
    "steps": ("schedule",),
    "of": ("schedule",),
    "every": ("interval", "toca", "duca", "modules"),
    "growth": ("interval", "toca", "duca", "modules"),
    "coefficients": ("teacache",),
    "ratios": ("magcache",),
    "signal": ("fbcache", "mbcache"),
}
# The same for predictors.
FORECAST_BY = {
    "order": ("taylor",),
    "degree": ("chebyshev",),
    "ridge": ("chebyshev",),
    "blend": ("chebyshev",),
    "window": ("chebyshev",),
    "reach": ("damped",),
}


# The same for attention's back-ends.
ATTENDED_BY = {"keep": ("sparse", "sol")}


def unused(cache: Cache, attention: Attention, *, steps: int | None) -> list[str]:
    """One sentence for each setting that differs from its default and that nothing looks at.

    steps: of the whole schedule, None where that is not known; a list without `of` may name some that lie beyond.
    """
    said = [
        f"attention.{name} is not used by attention.backend {attention.backend}, only by {' or '.join(takers)}"
        for name, takers in ATTENDED_BY.items()
        if getattr(attention, name) != getattr(Attention(), name) and attention.backend not in takers
    ]
    beyond = [step for step in cache.steps if steps is not None and step >= steps]
    if cache.method == "schedule" and not cache.of and beyond:
        said.append(f"cache.steps names step {beyond[0]}, beyond this run's {steps}: cache.of says how long its run is")
    for f in fields(cache):
        if getattr(cache, f.name) == f.default:
            continue
        for deciding, table in (("method", TAKEN_BY), ("predictor", FORECAST_BY)):
            takers = table.get(f.name, ())
            chosen = getattr(cache, deciding)
            if takers and chosen not in takers:
                said.append(f"cache.{f.name} is not used by cache.{deciding} {chosen}, only by {' or '.join(takers)}")
    return said
