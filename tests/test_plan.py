"""What a recipe means for a model: seams, skipped blocks, and one sentence for blocks that are not there."""

from __future__ import annotations

from typing import Any

import pytest

from hasten.anatomy import flux
from hasten.plan import Plan, make_plan
from hasten.recipe import Cache, Recipe


def plan(method: str, *, double: int = 4, single: int = 3, skip: dict[str, Any] | None = None, **cache: Any) -> Plan:
    recipe = Recipe.load({"schema": 1, "cache": {"method": method, **cache}, "skip": skip or {}})
    return make_plan(recipe, flux(double, single))


def test_blocks_are_counted_through_all_stages() -> None:
    anatomy = flux()
    assert (anatomy.blocks, anatomy.first_of("double"), anatomy.first_of("single")) == (57, 0, 19)
    with pytest.raises(KeyError):
        anatomy.stage("triple")
    with pytest.raises(KeyError):
        anatomy.first_of("triple")


@pytest.mark.parametrize(
    ("method", "cache"),
    [("teacache", {}), ("magcache", {"ratios": [1.0]}), ("interval", {}), ("schedule", {"steps": [0]})],
)
def test_a_span_of_all_blocks_has_its_seam_before_the_first(method: str, cache: dict[str, Any]) -> None:
    found = plan(method, **cache)
    assert (found.seams, found.end, found.whole_model) == ((0,), 6, False)
    assert found.signal == ("modulated" if method == "teacache" else "none")


def test_first_block_cache_has_its_seam_after_the_first_block() -> None:
    found = plan("fbcache")
    assert (found.seams, found.end, found.signal, found.entries) == ((1,), 6, "residual", {1: 0})
    assert plan("fbcache", signal="output").entries == {}


def test_multi_block_cache_has_a_seam_after_each_double_block() -> None:
    assert plan("mbcache").seams == (1, 2, 3, 4)
    assert plan("mbcache").entries == {1: 0, 2: 1, 3: 2, 4: 3}
    assert plan("mbcache", single=0).seams == (1, 2, 3)  # after the last block nothing is left to stand in for


def test_skipped_blocks_are_not_looked_at() -> None:
    assert plan("fbcache", skip={"double": [0]}).seams == (2,)
    assert plan("fbcache", skip={"double": [0]}).entries == {2: 1}
    found = plan("mbcache", skip={"double": [1], "single": [2]})
    assert (found.seams, found.skip) == ((1, 3, 4), frozenset({1, 6}))


def test_easycaches_span_is_the_whole_model() -> None:
    assert plan("easycache").whole_model
    assert plan("easycache").seams == ()


def test_no_cache_and_no_skip_is_idle() -> None:
    assert plan("none").idle
    assert not plan("none", skip={"single": [0]}).idle
    assert not plan("easycache").idle


@pytest.mark.parametrize(("skip", "named"), [({"double": [4]}, "double"), ({"single": [0, 3]}, "single")])
@pytest.mark.parametrize("method", ["none", "fbcache", "easycache", "interval"])
def test_a_block_that_is_not_there_is_refused_in_a_sentence(method: str, skip: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"skip\.{named} names block") as refusal:
        plan(method, skip=skip)
    assert "are allowed" in str(refusal.value) and "\n" not in str(refusal.value)


def test_skipping_every_block_is_refused() -> None:
    with pytest.raises(ValueError, match="every block"):
        plan("none", skip={"double": [0, 1, 2, 3], "single": [0, 1, 2]})


@pytest.mark.parametrize("method", ["fbcache", "mbcache"])
def test_a_method_that_looks_at_double_blocks_needs_one(method: str) -> None:
    with pytest.raises(ValueError, match="leaves none to look at"):
        plan(method, skip={"double": [0, 1, 2, 3]})


def test_more_thresholds_than_blocks_are_one_sentence() -> None:
    cache = Cache(method="mbcache", thresholds=(0.1,) * 3)
    assert make_plan(Recipe(cache=cache), flux(3, 1)).seams == (1, 2, 3)
    with pytest.raises(ValueError, match=r"cache\.thresholds has 3 numbers, and this model has 2 double blocks"):
        make_plan(Recipe(cache=cache), flux(2, 4))
