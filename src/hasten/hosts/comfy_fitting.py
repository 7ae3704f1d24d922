"""comfy_fitting.py fits a recipe to the model at hand: what the network is, which blocks it has, where its sigmas lie.

It knows ComfyUI's Flux network and our Sana by their classes' names, and nothing of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hasten.anatomy import Anatomy, flux, sana
from hasten.hosts.comfy_parts import has_mlp
from hasten.recipe import Attention, Recipe
from hasten.sections import Compile, Quantize


def anatomy_of(model: Any) -> Anatomy:
    """The anatomy of ComfyUI's Flux network or of our Sana, told by its class's name: no module is imported for that.

    Sana's network lies in comfy_sana_network.py. Raises ValueError for any other network, and for Flux variants whose
    blocks share one modulation (FLUX.2).
    """
    model = getattr(model, "_orig_mod", model)
    if any(c.__name__ == "SanaNetwork" for c in type(model).__mro__):
        return sana(len(model.double_blocks))
    if not any(c.__name__ == "Flux" and c.__module__.endswith("ldm.flux.model") for c in type(model).__mro__):
        raise ValueError(f"{type(model).__name__} is a family that is not known here (FLUX.1 and Sana are)")
    if getattr(getattr(model, "params", None), "global_modulation", False):
        raise ValueError("FLUX.2 is a family that is not known here (FLUX.1 is)")
    found = flux(len(model.double_blocks), len(model.single_blocks))
    if all(hasattr(block, "img_mlp") for block in model.double_blocks) and has_mlp(model):
        return found
    closed = tuple(replace(s, parts=tuple(p for p in s.parts if p != "mlp")) for s in found.stages)
    return replace(found, stages=closed)


def beside(recipe: Recipe) -> list[str]:
    """Remarks on what a recipe wants that other nodes do in ComfyUI."""
    return [
        f"the recipe's [{part}] is not used here: {title} does that"
        for part, wanted, title in (
            ("attention", recipe.attention != Attention(), "Lightning Attention"),
            ("compile", recipe.compile != Compile(), "Lightning Compile"),
            ("quantize", recipe.quantize != Quantize(), "the model's loader"),
        )
        if wanted
    ]


def fitted(recipe: Recipe, anatomy: Anatomy) -> tuple[Recipe, list[str]]:
    """The recipe without the blocks, in its skip lists and thresholds, that this model lacks, and remarks on those."""
    remarks = []
    kept = {}
    for name in ("double", "single"):
        count, listed = anatomy.stage(name).blocks, getattr(recipe.skip, name)
        kept[name] = tuple(i for i in listed if i < count)
        lacking = ", ".join(str(i) for i in listed if i >= count)
        if lacking:
            remarks.append(f"this model has {count} {name} blocks: {lacking} on the skip list not found")
    cache, doubles = recipe.cache, anatomy.stage("double").blocks
    if len(cache.thresholds) > doubles:
        remarks.append(
            f"this model has {doubles} double blocks: the other {len(cache.thresholds) - doubles} thresholds are unused"
        )
        cache = replace(cache, thresholds=cache.thresholds[:doubles])
    return replace(recipe, cache=cache, skip=replace(recipe.skip, **kept)), remarks


def with_percents(recipe: Recipe, percents: Sequence[float], sampling: Any) -> Recipe:
    """Start and end where ComfyUI's percents lie in this model's sigmas, as the original nodes have it."""
    start, end = percents
    bounds: dict[str, Any] = {}
    if start > 0.0:
        bounds["sigma_start"] = float(sampling.percent_to_sigma(start))
    if end < 1.0:
        bounds["sigma_end"] = float(sampling.percent_to_sigma(end))
    return replace(recipe, cache=replace(recipe.cache, **bounds)) if bounds else recipe


def steps_before(sigmas: Sequence[float], sampling: Any) -> int | None:
    """How many equal steps of the whole schedule lie before a run that begins late (denoise below 1).

    ComfyUI hands over the rest of a schedule only. Where in the model's own time its first sigma lies tells how long
    the whole one is, exactly so for schedulers with equal steps in time ("simple", "normal"). None where that is not
    to be known.
    """
    low, high = 0.0, 1.0
    if not sigmas or float(sampling.percent_to_sigma(low)) <= sigmas[0]:
        return 0
    for _ in range(40):  # percent falls to a float's precision
        middle = (low + high) / 2
        low, high = (middle, high) if float(sampling.percent_to_sigma(middle)) > sigmas[0] else (low, middle)
    steps = len(set(sigmas)) - 1
    return round(steps * low / (1.0 - low)) if low < 1.0 - 1e-6 else None
