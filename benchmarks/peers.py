"""Other libraries' caches on the same pipeline: diffusers' own hooks and cache-dit, each with its own settings.

They run in a process of their own (flux_nano.py --peers NAME): cache-dit assigns attributes of the pipeline's class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

LIBRARIES = ("diffusers", "cache-dit")


@dataclass(frozen=True)
class Peer:
    """One setting of another library's cache."""

    library: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None

    @contextmanager
    def on(self, pipe: Any) -> Iterator[None]:
        """The pipeline with that cache switched on; off again afterwards."""
        switch = _diffusers if self.library == "diffusers" else _cache_dit
        with switch(pipe, self.kind, dict(self.options)):
            yield


@contextmanager
def _diffusers(pipe: Any, kind: str, options: dict[str, Any]) -> Iterator[None]:
    import torch
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    if kind == "taylorseer":  # its factors are bfloat16 unless asked otherwise: that would be a handicap here
        options = {"taylor_factors_dtype": torch.float32, **options}
    configs = {"fbcache": FirstBlockCacheConfig, "magcache": MagCacheConfig, "taylorseer": TaylorSeerCacheConfig}
    pipe.transformer.enable_cache(configs[kind](**options))
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


@contextmanager
def _cache_dit(pipe: Any, kind: str, options: dict[str, Any]) -> Iterator[None]:
    import cache_dit
    from cache_dit import DMDCalibratorConfig, FoCaCalibratorConfig, TaylorSeerCalibratorConfig

    calibrators = {
        "taylor1": lambda: TaylorSeerCalibratorConfig(taylorseer_order=1),
        "taylor2": lambda: TaylorSeerCalibratorConfig(taylorseer_order=2),
        "foca": FoCaCalibratorConfig,
        "dmd": DMDCalibratorConfig,
    }
    calibrator = calibrators[kind]() if kind in calibrators else None
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**options), calibrator_config=calibrator)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


def installed(library: str) -> bool:
    """Whether the library can be imported here."""
    from importlib.util import find_spec

    return find_spec(library.replace("-", "_")) is not None
