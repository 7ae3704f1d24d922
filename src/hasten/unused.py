"""unused.py finds settings of a recipe's cache that its method or its predictor takes no notice of.

They are no error, for a threshold may be kept while methods are tried out; but the report says it, so that nobody turns
a knob that is connected to nothing.
"""

from __future__ import annotations

from dataclasses import fields

from hasten.recipe import Cache

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


def unused(cache: Cache) -> list[str]:
    """One sentence for each setting that differs from its default and that nothing looks at."""
    said = []
    for f in fields(cache):
        if getattr(cache, f.name) == f.default:
            continue
        for deciding, table in (("method", TAKEN_BY), ("predictor", FORECAST_BY)):
            takers = table.get(f.name, ())
            chosen = getattr(cache, deciding)
            if takers and chosen not in takers:
                said.append(f"cache.{f.name} is not used by cache.{deciding} {chosen}, only by {' or '.join(takers)}")
    return said
