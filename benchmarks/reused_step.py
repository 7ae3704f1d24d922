"""One reused step of First-Block cache by every library, beside its floor: the first block, embedders and last layer.

Called by flux_dev_step.py on the same model (`--reused`). A run is computed once and reused from then on, whatever
changed; what is timed is one call of the transformer on the host's clock, the device waited for.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

STEPS = 16
ALWAYS = 10.0  # a change beyond any

Run = Callable[[], AbstractContextManager[Any]]


def rows(
    model: Any, attention: Callable[[Any], Any], given: dict[str, Any], prepared: Callable[[Any], Any]
) -> Iterator[tuple[str, float]]:
    """Name and milliseconds of each row.

    attention: chooses a copy's attention. prepared: makes our stack of a copy, which their hooks have no place in.
    """
    stock = {"floor": floor, "hasten": ours, "diffusers FirstBlockCache": theirs, "cache-dit": dit}
    for suffix, libraries in (("", stock), (", our stack", {"floor": floor, "hasten": ours})):
        models = {}
        for name in libraries:
            # The same weights under every copy; our stack lays them otherwise and has its own.
            models[name] = copy.deepcopy(model, {} if suffix else {id(p): p for p in model.parameters()})
            attention(models[name])
            if name == "floor":
                first_block_only(models[name])
            if suffix:
                prepared(models[name])
        for name, times in milliseconds(models, given, libraries).items():
            yield f"reused step{suffix}: {name}", statistics.median(times)


def first_block_only(own: Any) -> None:
    """What a reused step cannot leave out."""
    own.transformer_blocks = own.transformer_blocks[:1]
    own.single_transformer_blocks = own.single_transformer_blocks[:0]


@contextmanager
def floor(own: Any) -> Iterator[Run]:
    """Nothing is cached: there is one block only."""
    yield nullcontext


@contextmanager
def ours(own: Any) -> Iterator[Run]:
    """This repository's."""
    import hasten

    recipe = {"schema": 1, "cache": {"method": "fbcache", "threshold": ALWAYS, "max_consecutive_hits": -1}}
    handle = hasten.apply(own, recipe)
    try:
        yield lambda: handle.run([1.0 - step / STEPS for step in range(STEPS + 1)])
    finally:
        handle.remove()


@contextmanager
def theirs(own: Any) -> Iterator[Run]:
    """diffusers' own."""
    from diffusers import FirstBlockCacheConfig

    own.enable_cache(FirstBlockCacheConfig(threshold=ALWAYS))
    try:
        yield lambda: own.cache_context("cond")
    finally:
        own.disable_cache()


@contextmanager
def dit(own: Any) -> Iterator[Run]:
    """cache-dit's, with one block in front and none behind."""
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=1,
        residual_diff_threshold=ALWAYS,
        num_inference_steps=STEPS,
    )
    cache_dit.enable_cache(own, cache_config=config)
    try:
        yield nullcontext
    finally:
        cache_dit.disable_cache(own)


def milliseconds(models: dict[str, Any], given: dict[str, Any], libraries: dict[str, Any]) -> dict[str, list[float]]:
    """Times of the reused calls of a few runs, taken in turns; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in libraries}
    with ExitStack() as stack:
        runs: dict[str, Run] = {}
        for name, library in libraries.items():
            try:
                runs[name] = stack.enter_context(library(models[name]))
            except Exception as error:  # one library's trouble must not lose the others' rows
                print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        for turn in range(4):
            for name, run in runs.items():
                with run():
                    for step in range(STEPS):
                        timestep = torch.full_like(given["timestep"], 1.0 - step / STEPS)
                        wait()
                        begun = time.perf_counter()
                        models[name](**{**given, "timestep": timestep})
                        wait()
                        if turn and step >= 2:
                            times[name].append((time.perf_counter() - begun) * 1000)
    return {name: found for name, found in times.items() if found}


def wait() -> None:
    """For the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
