"""One reused step of First-Block cache by every library, beside its floor: the first block, embedders and last layer.

Called by flux_dev_step.py on the same model (`--reused`). A run is computed once and reused from then on, whatever
changed; what is timed is one call of the transformer on the host's clock, the device waited for.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

STEPS = 16
TURNS = 4  # the first warms up
ALWAYS = 10.0  # a change beyond any

Run = Callable[[], AbstractContextManager[Any]]


def rows(
    model: Any,
    attention: Callable[[Any], Any],
    given: dict[str, Any],
    prepared: Callable[[Any], Any],
    *,
    profile: bool = False,
) -> Iterator[tuple[str, float]]:
    """Name and milliseconds of each row.

    attention: chooses a copy's attention. prepared: makes our stack of a copy, which their hooks have no place in.
    profile: prints where the GPU waits within one such step.
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
        for name, times in milliseconds(models, given, libraries, profile=profile).items():
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


def milliseconds(
    models: dict[str, Any], given: dict[str, Any], libraries: dict[str, Any], *, profile: bool
) -> dict[str, list[float]]:
    """Times of the reused calls of a few runs, taken in turns; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in libraries}
    with ExitStack() as stack:
        runs: dict[str, Run] = {}
        for name, library in libraries.items():
            try:
                runs[name] = stack.enter_context(library(models[name]))
            except Exception as error:  # one library's trouble must not lose the others' rows
                print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        for turn in range(TURNS + profile):
            for name, run in runs.items():
                with run():
                    for step in range(STEPS):
                        timestep = torch.full_like(given["timestep"], 1.0 - step / STEPS)
                        call = functools.partial(models[name], **{**given, "timestep": timestep})
                        if turn == TURNS and step == STEPS // 2:
                            print(name, *gaps(call), sep="\n", flush=True)
                            continue
                        wait()
                        begun = time.perf_counter()
                        call()
                        wait()
                        if 0 < turn < TURNS and step >= 2:
                            times[name].append((time.perf_counter() - begun) * 1000)
    return {name: found for name, found in times.items() if found}


def gaps(call: Callable[[], Any], longest: int = 8) -> Iterator[str]:
    """Lines about one call: what the GPU did, and between which kernels it waited. Nothing where there is none."""
    if not torch.cuda.is_available():
        call()
        return
    wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        begun = time.perf_counter()
        call()
        launched = time.perf_counter()
        wait()
        done = time.perf_counter()
    device = torch.autograd.DeviceType.CUDA
    events = sorted((e for e in found.events() if e.device_type == device), key=lambda e: e.time_range.start)
    busy, end, waits = 0.0, events[0].time_range.start, []
    for before, e in zip([None, *events], events, strict=False):
        if before is not None and e.time_range.start > end:
            waits.append((e.time_range.start - end, before.name[:48], e.name[:48]))
        busy += max(0.0, e.time_range.end - max(end, e.time_range.start))
        end = max(end, e.time_range.end)
    host, whole = ((t - begun) * 1000 for t in (launched, done))
    span = (end - events[0].time_range.start) / 1000
    yield f"  host {host:.2f} ms of {whole:.2f}; GPU {busy / 1000:.2f} of {span:.2f}, {len(events)} launches; waits:"
    for wait_us, before, after in sorted(waits, reverse=True)[:longest]:
        yield f"  {wait_us:7.0f} us  {before}  ->  {after}"


def wait() -> None:
    """For the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
