"""The laws of the ComfyUI host, in the real ComfyUI: what is computed is exact, and nothing stays behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hasten.hosts import comfy
from hasten.recipe import Recipe

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("default")]

# Of each method: settings under which nothing can be reused, and settings under which some steps are.
NEVER = {
    "fbcache": {"threshold": 0.0},
    "mbcache": {"threshold": 0.0, "signal": "output"},
    "teacache": {"threshold": 0.0},
    "easycache": {"threshold": 0.0},
    "interval": {"every": 1},
}
OFTEN = {
    "fbcache": {"threshold": 0.6},
    "mbcache": {"threshold": 0.3, "signal": "output", "relative_to": "current"},
    "teacache": {"threshold": 0.6},
    "easycache": {"threshold": 0.3},
    "interval": {"every": 3, "predictor": "taylor"},
}


def recipe(method: str = "interval", **cache: Any) -> Recipe:
    return Recipe.from_dict({"schema": 1, "cache": {"method": method, **cache}})


def run(rig: Any, model: Any, wanted: Recipe, **how: Any) -> tuple[torch.Tensor, Any]:
    patched = comfy.put_recipe(model, wanted)
    out = rig.sample(patched, **how)
    return out, comfy.reports_of(patched)[-1]


@pytest.mark.parametrize("method", NEVER)
def test_always_compute_is_bit_identical(rig: Any, model: Any, method: str) -> None:
    stock = rig.sample(model, cfg=2.0)
    out, report = run(rig, model, recipe(method, **NEVER[method]), cfg=2.0)
    assert torch.equal(out, stock)
    assert (report.computed, report.reused) == (8, 0)


@pytest.mark.parametrize("method", OFTEN)
def test_steps_are_reused_and_the_picture_is_near(rig: Any, model: Any, method: str) -> None:
    stock = rig.sample(model)
    out, report = run(rig, model, recipe(method, **OFTEN[method]))
    assert report.reused >= 2
    # A random net's flow is rough; a stand-in at a wrong place would be far off, not within its own size.
    assert (out - stock).abs().mean() < stock.abs().mean()


@pytest.mark.parametrize("method", OFTEN)
def test_run_bypass_run_equals_stock(rig: Any, model: Any, method: str) -> None:
    stock = rig.sample(model)
    first, _ = run(rig, model, recipe(method, **OFTEN[method]))
    assert torch.equal(rig.sample(model), stock)
    second, _ = run(rig, model, recipe(method, **OFTEN[method]))
    assert torch.equal(first, second)


@pytest.mark.parametrize("method", OFTEN)
def test_run_interrupt_run_equals_a_first_run(rig: Any, model: Any, method: str) -> None:
    patched = comfy.put_recipe(model, recipe(method, **OFTEN[method]))
    first = rig.sample(patched)

    def stop(step: int, *_: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rig.sample(patched, callback=stop)
    assert "did not come to its end" in comfy.reports_of(patched)[-1].line()
    assert torch.equal(rig.sample(patched), first)


def test_the_same_model_run_twice_starts_afresh(rig: Any, model: Any) -> None:
    patched = comfy.put_recipe(model, recipe("fbcache", **OFTEN["fbcache"]))
    counts = []
    for seed in (1, 2, 1):
        rig.sample(patched, seed=seed)
        counts.append(comfy.reports_of(patched)[-1].strip)
    assert counts[0] == counts[2]
    assert all(strip.count(".") >= 2 for strip in counts)


def test_a_clone_carries_plain_values_and_no_tensor(rig: Any, model: Any) -> None:
    patched = comfy.put_recipe(model, recipe("fbcache", **OFTEN["fbcache"]), node="3")
    rig.sample(patched)
    kept = patched.model_options["transformer_options"][comfy.KEY]
    assert copy.deepcopy(kept) == kept
    assert set(patched.model_options["transformer_options"]) == {comfy.KEY}
    assert comfy.KEY not in model.model_options["transformer_options"]


def test_two_clones_do_not_share_state(rig: Any, model: Any) -> None:
    one = comfy.put_recipe(model, recipe("interval", every=2))
    other = comfy.put_recipe(model, recipe("interval", every=4))
    rig.sample(one)
    rig.sample(other)
    assert comfy.reports_of(one)[-1].strip == "C.C.C.CC"
    assert comfy.reports_of(other)[-1].strip == "C...C..C"
    assert len(comfy.reports_of(one)) == 1


def test_a_second_node_replaces_the_first_and_says_so(rig: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[Any, str] = {}
    monkeypatch.setattr(comfy, "tell", lambda node, text: told.__setitem__(node, text))
    first = comfy.put_recipe(model, recipe("interval", every=2), node="1")
    second = comfy.put_recipe(first, recipe("interval", every=4), node="2", title="Apply FBCache")
    rig.sample(second)
    assert told["2"].startswith("computed 3 of 8")
    assert told["1"] == "not in charge: Apply FBCache, later in the graph, replaced it"
    assert comfy.reports_of(first) == []


def test_batches_and_guidance_agree_with_single_runs(rig: Any, model: Any) -> None:
    wanted = recipe("interval", every=3, predictor="taylor")
    batch, _ = run(rig, model, wanted, batch=4, cfg=2.0)
    noise = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(7))

    patched = comfy.put_recipe(model, wanted)
    for row in range(4):
        alone = rig.sample_noise(
            patched, noise[row : row + 1], 8, 2.0, "euler", "simple", rig.condition(), rig.condition(seed=2),
            torch.zeros(1, 16, 8, 8), disable_pbar=True,
        )  # fmt: skip
        assert torch.allclose(alone, batch[row : row + 1], atol=1e-4)


@pytest.mark.parametrize("method", OFTEN)
def test_conditions_of_unequal_length_agree_on_every_step(rig: Any, model: Any, method: str) -> None:
    stock = rig.sample(model, cfg=3.0, negative=rig.condition(tokens=7, seed=2))
    out, report = run(rig, model, recipe(method, **OFTEN[method]), cfg=3.0, negative=rig.condition(tokens=7, seed=2))
    assert [e.lanes for e in report.evaluations] == [2] * 8
    assert report.reused >= 1
    assert (out - stock).abs().mean() < stock.abs().mean()


def test_cfg_one_runs_the_positive_alone(rig: Any, model: Any) -> None:
    _, report = run(rig, model, recipe("interval", every=2), cfg=1.0)
    assert [e.lanes for e in report.evaluations] == [1] * 8
