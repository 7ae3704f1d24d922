"""torch.compile and gates: compiled blocks stay compiled, decisions never recompile, and the bits stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from runs import call, flux, hastened, model_inputs, paint, recipe, transformer
from torch._dynamo.utils import counters

import hasten

MIXED = {
    "fbcache": recipe("fbcache", threshold=10.0, max_consecutive_hits=2),
    "mbcache": recipe("mbcache", thresholds=[0.2, 10.0], max_consecutive_hits=2),
    "teacache": recipe("teacache", threshold=0.4),
    "taylor": recipe("interval", every=3, predictor="taylor", order=2),
    "chebyshev": recipe("interval", every=2, growth=0.5, predictor="chebyshev"),
    "easycache": recipe("easycache", threshold=10.0, max_consecutive_hits=2),
    "skip": recipe("schedule", steps=[0, 3], skip={"double": [1], "single": [0, 2]}),
}
ALWAYS = {
    "interval": recipe("interval", every=1),
    "fbcache": recipe("fbcache", threshold=0.0),
    "mbcache": recipe("mbcache", threshold=0.0),
    "teacache": recipe("teacache", threshold=0.0),
    "easycache": recipe("easycache", threshold=0.0),
}


class Backend:
    """An eager back-end that counts the graphs it is given and how often they are run."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def compiled() -> tuple[Any, Backend]:
    pipe, backend = flux(), Backend()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    return pipe, backend


def test_always_compute_within_compiled_blocks_is_bit_identical() -> None:
    pipe, backend = compiled()
    stock = paint(pipe, steps=4)
    graphs, runs = backend.graphs, backend.runs
    assert 0 < graphs < 6  # one for each kind of block, give or take: they really are compiled
    for i, settings in enumerate(ALWAYS.values(), start=2):
        latents, _ = hastened(pipe, settings, steps=4)
        assert torch.equal(latents, stock)
        # The same graphs ran, as often: inside the gates the blocks are still the compiled ones.
        assert (backend.graphs, backend.runs) == (graphs, i * runs)
    assert not counters["graph_break"]


def test_decisions_do_not_recompile_whichever_recipes_come_and_go() -> None:
    pipe, backend = compiled()
    stock = paint(pipe)
    graphs = backend.graphs
    for settings in MIXED.values():
        runs = backend.runs
        latents, report = hastened(pipe, settings)
        assert report.computed > 0 and report.reused > 0
        assert backend.graphs == graphs and backend.runs > runs
        assert torch.equal(latents, hastened(flux(), settings)[0])
    assert torch.equal(paint(pipe), stock)
    assert backend.graphs == graphs
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fbcache", "easycache"])
def test_blocks_compiled_inside_the_with_are_gated_all_the_same(name: str) -> None:
    pipe, backend = flux(), Backend()
    expected, eager = hastened(flux(), MIXED[name])
    with hasten.accelerate(pipe, MIXED[name]) as run:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
        assert torch.equal(paint(pipe), expected)
        graphs = backend.graphs
        assert torch.equal(paint(pipe), expected)
        assert run.report is not None and run.report.strip == eager.strip
    assert 0 < graphs == backend.graphs
    runs = backend.runs
    assert torch.equal(paint(pipe, steps=2), paint(flux(), steps=2))
    assert backend.runs > runs  # they stay compiled when the gates have gone
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_new_resolution_does_not_recompile_after_the_second() -> None:
    pipe, backend = compiled()
    with hasten.accelerate(pipe, MIXED["fbcache"]):
        for size in (64, 96):
            paint(pipe, size=size, steps=4)
        graphs = backend.graphs
        for size in (128, 80, 64):
            paint(pipe, size=size, steps=4)
    assert backend.graphs == graphs


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapper", "method", "inside"])
@pytest.mark.parametrize("name", ["fbcache", "easycache"])
def test_a_model_compiled_as_a_whole_is_right_or_says_why_not(name: str, how: str) -> None:
    def small() -> Any:
        return flux(double=1, single=1)

    pipe, backend = small(), Backend()
    stock, (cached, _) = paint(small()), hastened(small(), MIXED[name])
    if how == "wrapper":
        pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    elif how == "method":
        pipe.transformer.compile(backend=backend)
    with hasten.accelerate(pipe, MIXED[name]) as run:
        if how == "inside":
            pipe.transformer.compile(backend=backend)
        latents = paint(pipe)
        graphs = backend.graphs
        paint(pipe)
    assert graphs > 0 and backend.graphs == graphs
    report = run.report
    assert report is not None
    if name == "easycache":  # its span is the model itself
        assert torch.equal(latents, cached)
        assert report.reused > 0
    else:
        assert torch.equal(latents, stock)
        assert report.strip == "C" * 8
        assert "compile_repeated_blocks" in report.line()
    assert torch.equal(paint(pipe), stock)


@pytest.mark.slow
def test_a_bare_model_compiled_as_a_whole_is_right_or_says_why_not() -> None:
    def small() -> Any:
        return transformer(double=1, single=1)

    backend = Backend()
    inner, inputs = small(), model_inputs()
    model = torch.compile(inner, backend=backend)
    expected = [call(small(), inputs, sigma) for sigma in (1.0, 0.5)]
    handle = hasten.apply(model, MIXED["fbcache"])
    with pytest.raises(ValueError, match="accelerated already"):
        hasten.apply(model, MIXED["easycache"])
    with handle.run([1.0, 0.5, 0.25, 0.0]):
        assert all(torch.equal(call(model, inputs, s), e) for s, e in zip((1.0, 0.5), expected, strict=True))
    assert "compile_repeated_blocks" in handle.reports[-1].line()
    handle.remove()
    assert torch.equal(call(model, inputs, 0.5), expected[1])
    assert backend.graphs > 0
    # Its inner model is not compiled: applied to that, the same recipe reuses.
    handle = hasten.apply(inner, MIXED["fbcache"])
    with handle.run([1.0, 0.5, 0.25, 0.0]):
        for sigma in (1.0, 0.5, 0.25):
            call(inner, inputs, sigma)
    assert handle.reports[-1].strip == "C.C"
    handle.remove()
