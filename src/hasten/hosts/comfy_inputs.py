"""comfy_inputs.py turns what stands in a ComfyUI node's widgets into recipes. It knows no ComfyUI and no tensor.

The three cache nodes of the original ComfyUI-Lightning keep their rules: First-Block and multi-block cache look at a
block's output relative to the current one, TeaCache at the previous one, and none spares the first or the last step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hasten.recipe import DEFAULT_THRESHOLDS, TEACACHE_FLUX, Cache, Recipe, Skip

# The least that TeaCache's polynomial for FLUX gives, at a change of 0.053: at or below it nothing is ever reused.
TEACACHE_FLOOR = 0.18


def block_list(text: str, name: str) -> tuple[int, ...]:
    """Blocks such as "3,6,8,12" in order; empty for "". Raises ValueError in one sentence on anything else."""
    if not text.strip():
        return ()
    blocks = []
    for item in text.split(","):
        item = item.strip()
        if not (item.isascii() and item.isdigit()):
            what = "an empty entry" if not item else f"{item!r}"
            raise ValueError(
                f'{name} is {text!r} and holds {what}: whole numbers with commas are expected, such as "3,6,8,12", '
                "counted from 0."
            )
        blocks.append(int(item))
    return tuple(dict.fromkeys(blocks))


def threshold_list(text: str, default: float, name: str) -> tuple[float, ...]:
    """One threshold for each double block in order, an empty entry for the default. Raises ValueError."""
    if not text.strip():
        return ()
    limits = []
    for item in text.split(","):
        try:
            limits.append(float(item) if item.strip() else default)
        except ValueError:
            raise ValueError(
                f'{name} is {text!r} and holds {item.strip()!r}: numbers with commas are expected, such as "0.1,,0.3"; '
                "an empty entry stands for default_cache_threshold."
            ) from None
    return tuple(limits)


def skip_lists(double: str, single: str) -> Skip:
    """The skip lists as the original nodes' two texts have them. Raises ValueError."""
    return Skip(block_list(double, "skip_DoubleStreamBlocks"), block_list(single, "skip_SingleStreamBlocks"))


def teacache(threshold: float, skip: Skip, *, on: bool = True) -> tuple[Recipe, list[str]]:
    """The original Apply TeaCache node's recipe, and remarks for its line."""
    if not on:
        return Recipe(skip=skip), []
    cache = Cache(
        method="teacache", relative_to="previous", threshold=threshold, coefficients=TEACACHE_FLUX,
        first=False, last=False,
    )  # fmt: skip
    return Recipe(cache=cache, skip=skip), teacache_remarks(threshold)


def teacache_remarks(threshold: float) -> list[str]:
    """What has to be said of a TeaCache threshold: some can never hit."""
    if threshold > TEACACHE_FLOOR:
        return []
    return [f"TeaCache cannot reuse anything at a threshold of {TEACACHE_FLOOR} or below: try 0.25 to 0.6"]


def fbcache(threshold: float, max_consecutive_hits: int, skip: Skip) -> Recipe:
    """The original Apply FBCache node's recipe; start and end go beside it, in ComfyUI's percents."""
    cache = Cache(
        method="fbcache", signal="output", relative_to="current", threshold=threshold,
        max_consecutive_hits=max_consecutive_hits, first=False, last=False,
    )  # fmt: skip
    return Recipe(cache=cache, skip=skip)


def mbcache(threshold: float, thresholds: str, max_consecutive_hits: int, skip: Skip) -> Recipe:
    """The original Apply MBCache node's recipe. Raises ValueError on a malformed list."""
    cache = Cache(
        method="mbcache", signal="output", relative_to="current", threshold=threshold,
        thresholds=threshold_list(thresholds, threshold, "dsb_cache_thresholds"),
        max_consecutive_hits=max_consecutive_hits, first=False, last=False,
    )  # fmt: skip
    return Recipe(cache=cache, skip=skip)


def toca(values: dict[str, Any]) -> Recipe:
    """The original Apply ToCa node's recipe; its constants, and what it lacks, in `values`. Raises ValueError."""
    tokens = {
        "ratio": values["ratio"],
        "double": values["double_share"],
        "single": values["single_share"],
        "depth": values["layers"],
        "score": values["score"],
        "staleness": values["staleness"],
        "spatial": values["spatial"],
        "full_first": values["full_first"],
        "memory": values["memory"],
    }
    cache = {"method": "toca", "every": values["interval"], "first": False, "last": False}
    return Recipe.from_dict({"schema": 1, "cache": cache, "tokens": tokens})


def sana_mbcache(threshold: float, thresholds: str, max_consecutive_hits: int, skip_blocks: str) -> Recipe:
    """The original Apply MBCache node's recipe for Sana: it compares directions. Raises ValueError."""
    cache = Cache(
        method="mbcache", signal="output", distance="cosine", threshold=threshold,
        thresholds=threshold_list(thresholds, threshold, "block_cache_thresholds"),
        max_consecutive_hits=max_consecutive_hits, first=False, last=False,
    )  # fmt: skip
    return Recipe(cache=cache, skip=Skip(block_list(skip_blocks, "skip_blocks")))


def with_threshold(recipe: Recipe, threshold: float) -> tuple[Recipe, list[str]]:
    """The recipe with another threshold, where its method has one; below 0 the recipe's own is kept."""
    if threshold < 0:
        return recipe, []
    if recipe.cache.method not in DEFAULT_THRESHOLDS:
        return recipe, [f"the threshold is not used: the recipe's method is {recipe.cache.method}"]
    changed = replace(recipe, cache=replace(recipe.cache, threshold=threshold, thresholds=()), sana=None)
    return changed, teacache_remarks(threshold) if recipe.cache.method == "teacache" else []


def built(method: str, values: dict[str, Any]) -> Recipe:
    """The recipe that Lightning Recipe's widgets describe; only those that the method has are read. ValueError."""
    cache: dict[str, Any] = {"method": method}
    if method in DEFAULT_THRESHOLDS and values["threshold"] >= 0:
        cache["threshold"] = values["threshold"]
    if method == "mbcache" and values["thresholds"].strip():
        default = cache.get("threshold", DEFAULT_THRESHOLDS[method])
        cache["thresholds"] = list(threshold_list(values["thresholds"], default, "thresholds"))
    if method == "interval":
        cache |= {"every": values["every"], "growth": values["growth"]}
    if method != "none":
        cache |= {key: values[key] for key in ("predictor", "start", "end", "max_consecutive_hits")}
        if values["predictor"] == "taylor":
            cache["order"] = values["order"]
    skip = {
        "double": list(block_list(values["skip_double"], "skip_double")),
        "single": list(block_list(values["skip_single"], "skip_single")),
    }
    return Recipe.from_dict({"schema": 1, "cache": cache, "skip": skip})
