"""plan.py works out what a recipe means for one anatomy: which blocks are skipped, measured, stood in for.

It knows indices, never tensors. A *span* is the run of blocks that a remembered delta replaces; its *seam*
is the block before which the decision falls. The seam's input is what the stand-in is added to.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from hasten.anatomy import Anatomy
from hasten.recipe import INSIDE_BLOCKS, TEACACHE_FLUX, Recipe, Tokens


@dataclass(frozen=True)
class Plan:
    """Where gates act.

    seams: blocks before which an evaluation may turn to reuse, in the order they run.
    end: the last block of every span. skip: blocks that are never run.
    signal: what is measured at a seam: "none", "output", "residual", "modulated" or "model".
    entries: for each seam, the block whose input its residual is measured from.
    whole_model: the span is the model itself, embedders and final layer included (EasyCache).
    ratios: for each block the share of its tokens that is refreshed between full evaluations; empty where nothing
    inside blocks is remembered. doubles: how many blocks have two streams. tokens: how tokens are chosen (ToCa).
    """

    seams: tuple[int, ...]
    end: int
    skip: frozenset[int]
    signal: str
    entries: dict[int, int]
    whole_model: bool = False
    ratios: tuple[float, ...] = ()
    doubles: int = 0
    tokens: Tokens = field(default_factory=Tokens)

    @property
    def gated(self) -> bool:
        """Whether blocks need gates."""
        return bool(self.seams or self.skip or self.ratios)

    @property
    def refreshes(self) -> bool:
        """Whether any token is refreshed between full evaluations."""
        return any(ratio > 0.0 for ratio in self.ratios)

    @cached_property
    def entries_from(self) -> frozenset[int]:
        """Blocks whose input is kept because a seam's residual is measured from there."""
        return frozenset(self.entries.values())

    @cached_property
    def acted_at(self) -> frozenset[int]:
        """Blocks at which a gate does more than run its block or pass it; inside blocks, all of them."""
        return frozenset(self.seams) | self.entries_from | self.skip | ({self.end} if self.gated else frozenset())

    @cached_property
    def run_anyway(self) -> frozenset[int]:
        """Blocks before the first seam that are run whatever is decided there."""
        first = min(self.seams, default=0)
        return frozenset(block for block in range(first) if block not in self.skip and block != self.end)

    def without_reuse(self) -> Plan:
        """This plan with every block computed but those that are skipped."""
        return replace(self, seams=(), signal="none", entries={}, whole_model=False, ratios=())

    @property
    def idle(self) -> bool:
        """Whether no gate has anything to do."""
        return not self.gated and not self.whole_model


def make_plan(recipe: Recipe, anatomy: Anatomy) -> Plan:
    """The plan of `recipe` for `anatomy`. Raises ValueError when it names blocks that the model lacks."""
    skip = _skipped(recipe, anatomy)
    method = recipe.cache.method
    end = anatomy.blocks - 1
    if method == "none":
        return Plan((), end, skip, "none", {})
    if method == "easycache":
        return Plan((), end, skip, "model", {}, whole_model=True)
    if method in ("fbcache", "mbcache"):
        blocks, limits = anatomy.stage("double").blocks, len(recipe.cache.thresholds)
        if limits > blocks:
            raise ValueError(
                f"cache.thresholds has {limits} numbers, and this model has {blocks} double blocks: give one for each "
                "of them, or fewer."
            )
        return _after_blocks(recipe, anatomy, skip)
    if method in INSIDE_BLOCKS:
        # What DuCa reuses whole it remembers at block 0, as `interval` does.
        seams = (0,) if method == "duca" else ()
        doubles = sum(stage.blocks for stage in anatomy.stages if len(stage.streams) > 1)
        ratios = _ratios(recipe, anatomy)
        return Plan(seams, end, skip, "none", {}, ratios=ratios, doubles=doubles, tokens=recipe.tokens)
    signal = "modulated" if method == "teacache" else "none"
    return Plan((0,), end, skip, signal, {})


def fitted_to(recipe: Recipe, anatomy: Anatomy) -> tuple[Recipe, list[str]]:
    """The recipe as this family's models take it, without numbers that were fitted to another's, and what to say."""
    if recipe.sana is not None:
        recipe = replace(recipe, cache=recipe.sana if anatomy.family == "sana" else recipe.cache, sana=None)
    cache = recipe.cache
    if cache.method != "teacache" or cache.coefficients != TEACACHE_FLUX or anatomy.family == "flux":
        return recipe, []
    plain = replace(recipe, cache=replace(cache, coefficients=(1.0, 0.0)))
    return plain, [
        "TeaCache's coefficients are fitted to FLUX.1: here changes are added up as they are, so take a lower threshold"
    ]


# Layers that ToCa's term was counted over in DiT-XL/2, and that its FLUX code kept.
ORIGINAL_DEPTH = 27


def fresh_ratio(tokens: Tokens, layer: int, layers: int, *, double: bool) -> float:
    """The share of a layer's tokens that is refreshed: ratio x (1.5 - layer / depth) x the stage's term, 0 to 1.

    layer counts from 0 within its stage of `layers`. Source: ToCa (arXiv 2410.05317), its code for FLUX.
    """
    depth = ORIGINAL_DEPTH if tokens.depth == "original" else max(layers - 1, 1)
    ratio = tokens.ratio * (1.5 - layer / depth) * (tokens.double if double else tokens.single)
    return min(max(ratio, 0.0), 1.0)


def _ratios(recipe: Recipe, anatomy: Anatomy) -> tuple[float, ...]:
    found = []
    for stage in anatomy.stages:
        if "mlp" not in stage.parts:
            raise ValueError(
                f"{recipe.cache.method} sends tokens through each block's MLP, and the {stage.name} blocks of this "
                f"{anatomy.family} have none that can be reached: take fbcache or interval."
            )
        for layer in range(stage.blocks):
            whole = recipe.cache.method == "modules"
            ratio = fresh_ratio(recipe.tokens, layer, stage.blocks, double=len(stage.streams) > 1)
            found.append(0.0 if whole else ratio)
    return tuple(found)


def _after_blocks(recipe: Recipe, anatomy: Anatomy, skip: frozenset[int]) -> Plan:
    """Spans that begin after a double block: after the first one run (FBCache), or after each (MBCache)."""
    doubles = [i for i in range(anatomy.stage("double").blocks) if i not in skip]
    end = anatomy.blocks - 1
    if not doubles or doubles[0] == end:
        raise ValueError(
            f"{recipe.cache.method} looks at the model's double blocks, and skip.double leaves none to look at: "
            "take at least one block off the list."
        )
    looked_at = doubles if recipe.cache.method == "mbcache" else doubles[:1]
    looked_at = [block for block in looked_at if block < end]
    # The seam is measured on the NEXT block's input, not on the block's own output: hosts add ControlNet
    # residuals between the two, and the published rules look at the sum.
    entries = {block + 1: block for block in looked_at} if recipe.cache.signal == "residual" else {}
    return Plan(tuple(block + 1 for block in looked_at), end, skip, recipe.cache.signal, entries)


def _skipped(recipe: Recipe, anatomy: Anatomy) -> frozenset[int]:
    skipped: set[int] = set()
    for name, listed in (("double", recipe.skip.double), ("single", recipe.skip.single)):
        count = anatomy.stage(name).blocks
        beyond = [index for index in listed if index >= count]
        if beyond:
            raise ValueError(
                f"skip.{name} names block {beyond[0]}, and this model has {count} {name} blocks: "
                f"0 to {count - 1} are allowed."
            )
        skipped.update(anatomy.first_of(name) + index for index in listed)
    if len(skipped) == anatomy.blocks:
        raise ValueError("the skip lists name every block of the model: leave at least one to run.")
    return frozenset(skipped)
