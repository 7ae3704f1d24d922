"""The laws of the engine, on a tiny random FLUX in diffusers' own pipeline."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from runs import Cancelled, call, cancel_after, flux, hastened, model_inputs, paint, prompt, recipe, transformer
from torch import Tensor, nn

import hasten
from hasten.lane import History

RATIOS = [1.0, 1.1, 1.05, 1.02, 1.0, 0.99, 0.98, 0.95]

# Never reuses anything, each for its own reason.
ALWAYS = {
    "none": recipe(),
    "interval": recipe("interval", every=1),
    "interval-taylor": recipe("interval", every=1, predictor="taylor", order=2),
    "schedule": recipe("schedule", steps=list(range(8))),
    "fbcache": recipe("fbcache", threshold=0.0),
    "fbcache-output": recipe("fbcache", threshold=0.0, signal="output", relative_to="current"),
    "fbcache-float32": recipe("fbcache", threshold=0.0, dtype="float32", device="cpu"),
    "mbcache": recipe("mbcache", threshold=0.0),
    "teacache": recipe("teacache", threshold=0.0),
    "easycache": recipe("easycache", threshold=0.0),
    "magcache": recipe("magcache", threshold=0.0, ratios=RATIOS),
    "no-hits": recipe("fbcache", threshold=10.0, max_consecutive_hits=0),
    "never-started": recipe("fbcache", threshold=10.0, start=1.0),
}

# Reuses whatever it may.
EAGER = {
    "interval": recipe("interval", every=100, last=False),
    "taylor": recipe("interval", every=4, predictor="taylor", order=2, last=False),
    "chebyshev": recipe("interval", every=3, predictor="chebyshev", last=False),
    "schedule": recipe("schedule", steps=[0], first=False, last=False),
    "fbcache": recipe("fbcache", threshold=10.0, first=False, last=False),
    "fbcache-output": recipe("fbcache", threshold=10.0, signal="output", first=False, last=False),
    "mbcache": recipe("mbcache", threshold=10.0, first=False, last=False),
    "teacache": recipe("teacache", threshold=10.0, first=False, last=False),
    "easycache": recipe("easycache", threshold=10.0, first=False, last=False),
    "magcache": recipe("magcache", threshold=10.0, ratios=RATIOS, first=False, last=False),
}


def same(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first, second) and bool(first.isfinite().all())


@pytest.mark.parametrize("name", ALWAYS)
def test_always_compute_is_bit_identical(name: str) -> None:
    pipe = flux()
    stock = paint(pipe)
    latents, report = hastened(pipe, ALWAYS[name])
    assert same(latents, stock)
    assert report.strip == "C" * 8


@pytest.mark.parametrize("given", [{"dtype": torch.bfloat16}, {"batch": 3}, {"negative": 2}])
@pytest.mark.parametrize("name", ["interval", "fbcache", "mbcache", "teacache", "easycache"])
def test_always_compute_is_bit_identical_in_bf16_in_batches_and_with_true_cfg(name: str, given: dict[str, Any]) -> None:
    given = dict(given)
    dtype = given.pop("dtype", torch.float32)
    pipe = flux()
    pipe.transformer.to(dtype)
    words = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in prompt(**given).items()}
    stock = paint(pipe, steps=4, **words)
    latents, report = hastened(pipe, ALWAYS[name], steps=4, **words)
    assert same(latents, stock)
    assert report.strip == "CCCC"


@pytest.mark.parametrize("name", EAGER)
def test_a_fresh_lane_always_computes(name: str) -> None:
    _, report = hastened(flux(), EAGER[name], steps=6)
    assert report.strip.startswith("C")
    assert report.reused > 0
    assert report.evaluations[0].reason in ("fresh lane", "first")


@pytest.mark.parametrize("name", EAGER)
def test_a_new_shape_in_a_run_is_a_fresh_lane(name: str) -> None:
    model = transformer()
    small, large = model_inputs(size=4), model_inputs(size=6)
    large["encoder_hidden_states"] = small["encoder_hidden_states"]
    handle = hasten.apply(model, EAGER[name])
    stock = call(transformer(), large, 0.25)
    with handle.run([1.0, 0.75, 0.5, 0.25, 0.125, 0.0]):
        for sigma in (1.0, 0.75, 0.5):
            call(model, small, sigma)
        assert same(call(model, large, 0.25), stock)
    assert handle.reports[-1].strip[2:] == ".C"


@pytest.mark.parametrize("name", EAGER)
def test_run_cancel_run_equals_a_first_run(name: str) -> None:
    first, report = hastened(flux(), EAGER[name])
    pipe = flux()
    with hasten.accelerate(pipe, EAGER[name]) as run:
        with pytest.raises(Cancelled):
            paint(pipe, seed=7, **cancel_after(3))
        again = paint(pipe)
    assert same(again, first)
    assert [r.strip for r in run.reports] == [report.strip[:4], report.strip]


@pytest.mark.parametrize("name", EAGER)
def test_run_remove_run_equals_stock(name: str) -> None:
    pipe = flux()
    stock = paint(pipe)
    accelerated, _ = hastened(pipe, EAGER[name])
    assert not torch.equal(accelerated, stock)
    assert same(paint(pipe), stock)


def test_an_error_inside_the_model_leaves_it_as_it_was() -> None:
    pipe = flux()
    stock = paint(pipe)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with hasten.accelerate(pipe, EAGER["fbcache"]):
        hook = pipe.transformer.single_transformer_blocks[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            paint(pipe)
        hook.remove()
        first = paint(pipe)
    assert same(first, hastened(flux(), EAGER["fbcache"])[0])
    assert same(paint(pipe), stock)


@pytest.mark.parametrize("name", ["fbcache", "taylor", "easycache", "mbcache", "teacache"])
def test_two_pipelines_do_not_share_state(name: str) -> None:
    mine, theirs = EAGER[name], EAGER["chebyshev"]
    alone, other_alone = hastened(flux(), mine)[0], hastened(flux(seed=5), theirs, seed=3)[0]
    pipe, other = flux(), flux(seed=5)
    others = []

    def interleave(_: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step in (2, 4):
            others.append(paint(other, seed=3))
        return tensors

    with hasten.accelerate(pipe, mine) as run, hasten.accelerate(other, theirs) as other_run:
        latents = paint(pipe, callback_on_step_end=interleave)
    assert same(latents, alone)
    assert [same(found, other_alone) for found in others] == [True, True]
    assert len(run.reports) == 1 and len(other_run.reports) == 2


def test_two_pipelines_with_one_scheduler_do_not_share_state() -> None:
    first, second = flux(), flux(seed=5)
    second.scheduler = first.scheduler
    expected = hastened(flux(), EAGER["fbcache"])[0], hastened(flux(seed=5), EAGER["taylor"])[0]
    with hasten.accelerate(first, EAGER["fbcache"]) as outer:
        with hasten.accelerate(second, EAGER["taylor"]) as inner:
            assert same(paint(first), expected[0])
            assert same(paint(second), expected[1])
        assert same(paint(first), expected[0])
    assert len(outer.reports) == 2 and len(inner.reports) == 1
    assert not {"set_timesteps", "step"} & set(vars(first.scheduler))


def test_two_pipelines_with_one_scheduler_may_leave_in_any_order() -> None:
    first, second = flux(), flux(seed=5)
    second.scheduler = first.scheduler
    expected = hastened(flux(seed=5), EAGER["taylor"])[0]
    outer, inner = hasten.accelerate(first, EAGER["fbcache"]), hasten.accelerate(second, EAGER["taylor"])
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert same(paint(second), expected)  # still seen
    inner.__exit__(None, None, None)
    assert len(inner.reports) == 1 and not outer.reports
    assert not {"set_timesteps", "step"} & set(vars(first.scheduler))


@pytest.mark.parametrize("name", EAGER)
def test_cond_and_uncond_have_their_own_lanes(name: str) -> None:
    # Equal prompts make equal lanes: guidance between them changes nothing, whatever is reused.
    plain, report = hastened(flux(), EAGER[name])
    words = prompt(1, negative=1)
    guided, guided_report = hastened(flux(), EAGER[name], **words)
    torch.testing.assert_close(guided, plain, rtol=1e-4, atol=1e-5)
    assert guided_report.strip == report.strip
    # Different ones stay apart: each equals what it gives alone when guidance takes one of them only.
    assert {e.lanes for e in guided_report.evaluations} == {2}


@pytest.mark.parametrize("name", EAGER)
def test_cond_and_uncond_never_disagree(name: str) -> None:
    pipe = flux()
    last = pipe.transformer.single_transformer_blocks[-1]
    ran: list[int] = []
    last.register_forward_hook(lambda *_: ran.append(1))
    _, report = hastened(pipe, EAGER[name], **prompt(1, negative=2))
    assert len(ran) == 2 * report.computed
    assert report.reused > 0
    assert report.notes == []


@pytest.mark.parametrize("name", EAGER)
def test_two_resolutions_one_after_the_other_do_not_share_state(name: str) -> None:
    pipe = flux()
    with hasten.accelerate(pipe, EAGER[name]):
        found = [paint(pipe, size=size) for size in (64, 96, 64)]
    expected = [hastened(flux(), EAGER[name], size=size)[0] for size in (64, 96)]
    assert same(found[0], expected[0]) and same(found[1], expected[1]) and same(found[2], expected[0])


@pytest.mark.parametrize("name", ["interval", "taylor", "chebyshev", "schedule"])
def test_a_batch_of_four_gives_what_each_gives_alone(name: str) -> None:
    start = torch.cat([paint(flux(), steps=1, seed=seed) for seed in range(4)])
    together, _ = hastened(flux(), EAGER[name], latents=start, **prompt(1, batch=4))
    for i in range(4):
        alone, _ = hastened(flux(), EAGER[name], latents=start[i : i + 1])
        distance = (together[i : i + 1] - alone).abs().max() / alone.abs().max()
        assert distance < 1e-5


def snapshot(pipe: Any) -> dict[Any, Any]:
    """Every attribute of every module, by identity; containers by their content."""
    kept = {}
    for name, module in pipe.transformer.named_modules():
        for key, value in vars(module).items():
            kept[name, key] = list(value.items()) if isinstance(value, dict) else id(value)
    return kept


def classes(pipe: Any) -> dict[Any, int]:
    kinds = {type(module) for module in pipe.transformer.modules()} | {type(pipe), type(pipe.scheduler), nn.Module}
    return {(kind, key): id(value) for kind in kinds for key, value in vars(kind).items()}


@pytest.mark.parametrize("name", EAGER)
def test_nothing_is_left_on_modules_classes_or_scheduler(name: str) -> None:
    pipe = flux()
    paint(pipe, steps=2)
    modules, kinds, scheduler = snapshot(pipe), classes(pipe), dict(vars(pipe.scheduler))
    with hasten.accelerate(pipe, EAGER[name]):
        assert classes(pipe) == kinds
    assert snapshot(pipe) == modules
    assert classes(pipe) == kinds
    assert vars(pipe.scheduler).keys() == scheduler.keys()
    assert all(vars(pipe.scheduler)[key] is value for key, value in scheduler.items())
    with pytest.raises(Cancelled), hasten.accelerate(pipe, EAGER[name]):
        paint(pipe, steps=4, **cancel_after(2))
    assert snapshot(pipe) == modules
    assert classes(pipe) == kinds
    assert vars(pipe.scheduler).keys() == scheduler.keys()


def test_an_accelerated_transformer_is_copied_without_its_gates() -> None:
    pipe = flux()
    stock = paint(pipe)
    with hasten.accelerate(pipe, EAGER["interval"]):
        twin = copy.deepcopy(pipe.transformer)
        other = flux()
        other.transformer = twin
        assert same(paint(other), stock)


def test_a_second_accelerate_on_one_transformer_is_refused_in_a_sentence() -> None:
    pipe = flux()
    stock = paint(pipe)
    with hasten.accelerate(pipe, EAGER["interval"]):
        for again in (lambda: hasten.apply(pipe.transformer, recipe()), hasten.accelerate(pipe, recipe()).__enter__):
            with pytest.raises(ValueError, match="accelerated already") as refusal:
                again()
            assert "\n" not in str(refusal.value)
    assert same(paint(pipe), stock)


def histories() -> list[History]:
    return [thing for thing in gc.get_objects() if type(thing) is History]


@pytest.mark.parametrize("name", ["taylor", "mbcache", "easycache"])
def test_a_run_drops_its_session_when_it_ends(name: str) -> None:
    pipe = flux()
    deltas: list[weakref.ref[Tensor]] = []

    def look(_: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            deltas.extend(weakref.ref(delta) for history in histories() for delta in history.deltas)
        return tensors

    with hasten.accelerate(pipe, EAGER[name]):
        paint(pipe, callback_on_step_end=look)
        # Inside the `with`, and without waiting for the garbage collector: the decoder needs the room.
        assert deltas
        assert [ref for ref in deltas if ref() is not None] == []
    with pytest.raises(Cancelled), hasten.accelerate(pipe, EAGER[name]):
        paint(pipe, **cancel_after(3))
    gc.collect()
    assert histories() == []


def test_a_cancelled_run_then_one_from_a_lower_sigma_computes_first() -> None:
    model, inputs = transformer(), model_inputs()
    handle = hasten.apply(model, EAGER["fbcache"])
    expected = call(transformer(), inputs, 0.5)
    with pytest.raises(Cancelled), handle.run([1.0, 0.75, 0.5, 0.25, 0.0]):
        call(model, inputs, 1.0)
        call(model, inputs, 0.75)
        raise Cancelled
    with handle.run([0.5, 0.25, 0.0]):
        assert same(call(model, inputs, 0.5), expected)
        call(model, inputs, 0.25)
    assert [r.strip for r in handle.reports] == ["C.", "C."]
