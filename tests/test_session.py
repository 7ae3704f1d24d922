"""One run's memory, driven by gates around blocks of plain arithmetic, so that every number can be worked out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from runs import call, flux, hastened, model_inputs, noise, prompt, recipe, transformer
from test_moment import bf16, shifted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hasten
from hasten.anatomy import flux as flux_anatomy
from hasten.gate import Gate, gate_model
from hasten.plan import make_plan
from hasten.recipe import Recipe
from hasten.session import Session

SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
Blocks = Sequence[Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Streams:
    image: Tensor

    def modulated(self) -> Tensor:
        return self.image * 2.0


class Model:
    """A model of plain blocks, with something added between them as a ControlNet would."""

    def __init__(self, *blocks: Callable[[Tensor], Tensor], between: float = 0.0) -> None:
        self.blocks, self.between, self.ran = blocks, between, [0] * len(blocks)

    def __call__(
        self, session: Session, x: Tensor, sigma: float, *, conditions: Sequence[str] = ("a",), **given: Any
    ) -> Tensor:
        entered = session.enter(conditions, x, sigma=sigma, **given)
        streams = Streams(x)
        for i, block in enumerate(self.blocks):

            def run(i: int = i, block: Callable[[Tensor], Tensor] = block, streams: Streams = streams) -> Streams:
                self.ran[i] += 1
                return Streams(block(streams.image))

            streams = Gate(i)(entered, streams, run, Streams)
            if self.between:
                streams = Streams(streams.image + self.between)
        session.leave(entered)
        return streams.image


def session(settings: dict[str, Any], *, sigmas: Sequence[float] = SIGMAS, double: int = 2, single: int = 1) -> Session:
    loaded = Recipe.load(settings)
    return Session(loaded, make_plan(loaded, flux_anatomy(double, single)), sigmas)


def doubling() -> Model:
    return Model(*[lambda x: x * 2.0] * 3)


X = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])


def test_holding_adds_what_the_span_added_before() -> None:
    run, model = session(recipe("schedule", steps=[0], last=False)), doubling()
    assert torch.equal(model(run, X, 1.0), 8 * X)
    # Computed it would be 8 * 2X = 16X; held it is 2X + (8X - X).
    assert torch.equal(model(run, 2 * X, 0.8), 9 * X)
    assert model.ran == [1, 1, 1]


def test_first_block_cache_runs_the_first_block_and_stands_in_for_the_rest() -> None:
    run, model = session(recipe("fbcache", threshold=10.0, last=False)), doubling()
    model(run, X, 1.0)
    # The first block gives 4X; held it is 4X + (8X - 2X).
    assert torch.equal(model(run, 2 * X, 0.8), 10 * X)
    assert model.ran == [2, 1, 1]
    # Its residual went from X to 2X: a change of 1.
    assert run.report.evaluations[1].change == 1.0
    assert run.report.evaluations[1].block == 1


@pytest.mark.parametrize(
    ("cache", "change"),
    [
        ({"signal": "residual", "relative_to": "previous"}, 1.0),
        ({"signal": "residual", "relative_to": "current"}, 0.5),
        ({"signal": "output", "relative_to": "previous"}, 1.0),
        ({"signal": "output", "relative_to": "current"}, 0.5),
    ],
)
def test_changes_are_relative_to_what_the_recipe_says(cache: dict[str, str], change: float) -> None:
    run, model = session(recipe("fbcache", threshold=0.0, **cache)), doubling()
    model(run, X, 1.0)
    model(run, 2 * X, 0.8)
    assert run.report.evaluations[1].change == pytest.approx(change)


def test_a_residual_is_not_the_output() -> None:
    changes = {}
    for signal in ("residual", "output"):
        run, model = session(recipe("fbcache", threshold=0.0, signal=signal)), Model(*[lambda x: x + 1.0] * 3)
        model(run, X, 1.0)
        model(run, X + 8.0, 0.8)
        changes[signal] = run.report.evaluations[1].change
    assert changes == {"residual": 0.0, "output": pytest.approx(8 / 5)}


@pytest.mark.parametrize(("compare_with", "expected"), [("computed", [2.0, 3.0]), ("latest", [2.0, 4 / 3])])
def test_a_signal_is_compared_with_the_last_computed_or_the_latest(compare_with: str, expected: list[float]) -> None:
    settings = recipe("fbcache", threshold=10.0, signal="output", compare_with=compare_with, last=False)
    run, model = session(settings), doubling()
    for scale, sigma in ((1.0, 1.0), (3.0, 0.8), (7.0 if compare_with == "latest" else 4.0, 0.6)):
        model(run, scale * X, sigma)
    assert run.report.strip == "C.."
    assert [e.change for e in run.report.evaluations[1:]] == pytest.approx(expected)


def test_multi_block_cache_stops_at_the_first_block_under_its_threshold() -> None:
    # Output changes after the two double blocks: |3x - 3| / 3 at x = 1.1, then a constant, so 0.1 and 0.
    model = Model(lambda x: x * 3.0, lambda x: x * 0.0 + 5.0, lambda x: x + 1.0)
    one = torch.ones(1, 2, 2)
    for thresholds, block, ran in (
        ([0.2, 0.2], 1, [2, 1, 1]),
        ([0.05, 0.2], 2, [2, 2, 1]),
        ([0.05, 0.0], None, [2, 2, 2]),
    ):
        model.ran = [0, 0, 0]
        run = session(recipe("mbcache", thresholds=thresholds, signal="output", last=False))
        model(run, one, 1.0)
        out = model(run, 1.1 * one, 0.8)
        assert model.ran == ran
        assert run.report.evaluations[1].block == block
        # After block 0: 3.3 + (6 - 3); after block 1: 5 + (6 - 5).
        torch.testing.assert_close(out, {1: 6.3, 2: 6.0, None: 6.0}[block] * one)


def test_an_early_exit_leaves_later_blocks_with_their_older_history() -> None:
    model = doubling()
    run = session(recipe("mbcache", thresholds=[0.6, 5.0], signal="output", last=False))
    model(run, X, 1.0)
    model(run, 1.5 * X, 0.8)  # a change of 0.5: reused after block 0
    model(run, 6.0 * X, 0.6)  # 3 from 1.5 after block 0; 5 from 1 after block 1, which was not reached before
    changes = [e.change for e in run.report.evaluations]
    assert changes[1:] == pytest.approx([0.5, 5.0])
    assert run.report.strip == "C.C"


def test_what_is_added_between_blocks_is_counted_once() -> None:
    # With equal inputs a whole reuse must give the computed output back, whatever a ControlNet adds in between.
    for settings in (
        recipe("schedule", steps=[0], last=False),
        recipe("fbcache", threshold=10.0, last=False),
        recipe("fbcache", threshold=10.0, last=False, signal="output"),
        recipe("mbcache", threshold=10.0, last=False),
        recipe("teacache", threshold=10.0, last=False),
    ):
        run, model = session(settings), Model(*[lambda x: x * 2.0] * 3, between=16.0)
        computed = model(run, X, 1.0)
        assert torch.equal(model(run, X, 0.8), computed)
        assert run.report.strip == "C."


@pytest.mark.parametrize("order", [0, 1, 2])
def test_taylor_follows_a_delta_that_moves_with_sigma(order: int) -> None:
    run = session(recipe("schedule", steps=[0, 1, 2], predictor="taylor", order=order, last=False))
    for sigma in SIGMAS[:4]:
        out = Model(*[lambda x, s=sigma: x + s * s] * 3)(run, X, sigma)  # type: ignore[misc]
    assert run.report.strip == "CCC."
    # The delta is 3 sigma^2: exact for order 2, off by 0.24 for order 1 and by 0.6 for order 0.
    error = float((out - X - 3 * SIGMAS[3] ** 2).abs().max())
    assert error == pytest.approx({0: 0.6, 1: 0.24, 2: 0.0}[order], abs=1e-4)


def test_fitted_weights_are_used_as_they_are() -> None:
    settings = recipe(
        "schedule", steps=[0, 1], predictor="weights", weights=[[0.5, -2.0], [1.0], [0.0, 0.25]], last=False
    )
    run, model = session(settings), Model(*[lambda x: x + 1.0] * 3)
    assert torch.equal(model(run, X, 1.0), X + 3.0)
    model.blocks = tuple([lambda x: x + 2.0] * 3)
    assert torch.equal(model(run, X, 0.8), X + 6.0)
    torch.testing.assert_close(model(run, X, 0.6), X + 0.5 * 3 - 2.0 * 6)
    torch.testing.assert_close(model(run, X, 0.4), X + 6.0)
    torch.testing.assert_close(model(run, X, 0.2), X + 0.25 * 6)


@pytest.mark.parametrize("cache", ["fbcache", "teacache", "mbcache"])
def test_the_largest_change_among_a_calls_lanes_decides(cache: str) -> None:
    coefficients = {"coefficients": [1.0, 0.0]} if cache == "teacache" else {}
    for scale, strip in ((1.1, "C."), (3.0, "CC")):
        run = session(recipe(cache, threshold=0.5, signal="output", last=False, **coefficients))
        doubling()(run, torch.cat([X, X]), 1.0, conditions=("a", "b"))
        doubling()(run, torch.cat([X, scale * X]), 0.8, conditions=("a", "b"))
        assert run.report.strip == strip
        assert run.report.evaluations[1].change == pytest.approx(scale - 1.0)
        assert [e.lanes for e in run.report.evaluations] == [2, 2]


def test_lanes_in_one_batch_equal_lanes_in_calls_of_their_own() -> None:
    settings = recipe("interval", every=2, predictor="taylor", last=False)
    together, apart = session(settings), session(settings)
    for i, sigma in enumerate(SIGMAS[:-1]):
        a, b = X * (1 + i), X - i
        both = doubling()(together, torch.cat([a, b]), sigma, conditions=("a", "b"))
        alone = [doubling()(apart, x, sigma, conditions=(name,)) for x, name in ((a, "a"), (b, "b"))]
        assert torch.equal(both, torch.cat(alone))
    assert together.report.strip == apart.report.strip == "C.C.C"
    assert [e.lanes for e in apart.report.evaluations] == [2] * 5


def test_the_first_call_decides_for_its_whole_evaluation() -> None:
    run, model = session(recipe("fbcache", threshold=0.5, signal="output", last=False)), doubling()
    for name in ("a", "b"):
        model(run, X, 1.0, conditions=(name,))
    model(run, 1.1 * X, 0.8, conditions=("a",))
    model(run, 9.0 * X, 0.8, conditions=("b",))  # alone it would compute
    model(run, 9.0 * X, 0.6, conditions=("b",))  # now it is first
    model(run, 1.1 * X, 0.6, conditions=("a",))
    assert run.report.strip == "C.C" or run.report.strip == "C.."
    assert model.ran[0] == 6
    assert model.ran[1] in (2, 4)  # never 3: both or neither


def test_a_lane_without_history_computes_while_another_reuses_and_it_is_said() -> None:
    run, model = session(recipe("schedule", steps=[0], last=False)), doubling()
    model(run, X, 1.0, conditions=("a",))
    model(run, X, 0.8, conditions=("a",))
    assert torch.equal(model(run, 3 * X, 0.8, conditions=("new",)), 24 * X)
    assert any("without history" in note for note in run.report.notes)


def test_an_uneven_batch_is_another_lane() -> None:
    run, model = session(recipe("schedule", steps=[0], last=False)), doubling()
    model(run, X, 1.0)
    assert torch.equal(model(run, torch.cat([X, X]), 0.8), 8 * torch.cat([X, X]))
    assert torch.equal(model(run, X.double(), 0.6), 8 * X.double())
    assert run.report.strip == "CCC"


def test_each_ordinal_of_an_interval_has_its_own_history() -> None:
    # Heun: two evaluations at each sigma but the first; they must not be extrapolated from each other.
    run = session(recipe("schedule", steps=[0, 1], last=False))
    outs = {}
    for i, sigma in enumerate([1.0, 0.8, 0.8, 0.6, 0.6]):
        ordinal = 1 if i in (2, 4) else 0
        model = Model(*[lambda x, o=ordinal: x + 1.0 + 100.0 * o] * 3)  # type: ignore[misc]
        outs[i] = model(run, X, sigma)
        run.move_on()
    assert run.report.strip == "CCC.."
    assert torch.equal(outs[3], X + 3.0)
    assert torch.equal(outs[4], X + 303.0)


def test_a_sigma_that_rises_is_a_run_that_began_anew() -> None:
    run, model = session(recipe("schedule", steps=[100], first=False, last=False)), doubling()
    for sigma in (1.0, 0.8, 0.6, 1.0, 0.8):
        model(run, X, sigma)
    assert run.report.strip == "C..C."
    assert run.report.notes[1:] == ["sigma rose from 0.6 to 1: started afresh"]  # the first: no step 100 here


def test_a_sigma_that_rises_to_the_same_place_again_is_said_once() -> None:
    run, model = session(recipe("schedule", steps=[100], first=False, last=False)), doubling()
    for sigma in (1.0, 0.6, 1.0, 0.6, 1.0):
        model(run, X, sigma)
    assert run.report.notes[1:] == ["sigma rose from 0.6 to 1: started afresh"]  # the first: no step 100 here


def test_lanes_of_conditions_that_are_made_anew_for_each_call_do_not_pile_up() -> None:
    count = 40
    run = session(recipe("interval", every=2), sigmas=[1 - i / count for i in range(count)] + [0.0])
    for i in range(count):
        key = run.identity(noise(1, 2, seed=i))
        doubling()(run, X, 1 - i / count, conditions=(key,))  # type: ignore[arg-type]
        assert len(run._lanes) <= 8 and len(run._held) <= 8
        assert key in run._held
    assert run.report.strip == "C" * count
    assert [note for note in run.report.notes if "made anew" in note] == run.report.notes != []


def test_a_condition_that_pauses_keeps_its_lane() -> None:
    run, model = session(recipe("schedule", steps=[0], last=False)), doubling()
    model(run, torch.cat([X, X]), 1.0, conditions=("a", "b"))
    for sigma in SIGMAS[1:4]:
        model(run, X, sigma, conditions=("a",))
    assert torch.equal(model(run, torch.cat([X, X]), 0.2, conditions=("a", "b")), 8 * torch.cat([X, X]))
    assert run.report.strip == "C...." and run.report.notes == []


def test_where_the_clock_sees_only_launches_the_report_says_so() -> None:
    run = session(recipe("schedule", steps=[0], last=False))
    for sigma in SIGMAS[:3]:
        doubling()(run, X.to("meta"), sigma)
    assert run.report.notes == ["milliseconds on meta are of launching the work, not of doing it"]
    assert "about" not in run.close().line()


def test_where_in_a_whole_run_a_late_one_begins_is_said_when_it_is_not_known() -> None:
    for settings, said in ((recipe("schedule", steps=[0, 2]), 1), (recipe("magcache", ratios=[1.0]), 1), (recipe(), 0)):
        assert len(session(settings, sigmas=[0.6, 0.3, 0.0]).report.notes) == said


@pytest.mark.parametrize("steps", [20, 50, 100])
@pytest.mark.parametrize("mu", [0.5, 0.8, 1.15])
def test_cond_and_uncond_stay_together_where_bf16_blurs_the_sigmas(steps: int, mu: float) -> None:
    sigmas = shifted(steps, mu)
    run, model = session(recipe("interval", every=3, last=False), sigmas=sigmas), doubling()
    for sigma in sigmas[:-1]:
        for name in ("cond", "uncond"):
            model(run, X, bf16(bf16(sigma * 1000.0) / 1000.0), conditions=(name,), rounded_in=torch.bfloat16)
    assert [e.interval for e in run.report.evaluations] == list(range(steps))
    assert {e.lanes for e in run.report.evaluations} == {2}
    assert [e.sigma for e in run.report.evaluations] == sigmas[:-1]


METHODS = {
    "fbcache": recipe("fbcache", threshold=10.0, last=False),
    "fbcache-output": recipe("fbcache", threshold=10.0, signal="output", last=False),
    "mbcache": recipe("mbcache", threshold=10.0, last=False),
    "teacache": recipe("teacache", threshold=10.0, last=False),
    "interval": recipe("interval", every=2, predictor="taylor", last=False),
    "always": recipe("interval", every=1, predictor="taylor", order=2),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_lane_owns_its_tensors(name: str, batch: int) -> None:
    # A host adds into its tensors in place: before, between and after the blocks, and into what it was given back.
    def in_place(x: Tensor) -> Tensor:
        return x.mul_(1.5)

    def spoiled(run: Session, blocks: Blocks, x: Tensor, sigma: float) -> Tensor:
        x = x.clone()
        out = Model(*blocks)(run, x, sigma, conditions=("a", "b")[:batch])
        found = out.clone()
        out.fill_(float("nan"))
        x.fill_(float("nan"))
        return found

    clean, dirty = session(METHODS[name]), session(METHODS[name])
    for i, sigma in enumerate(SIGMAS[:-1]):
        x = torch.cat([X, 2 * X])[:batch] + i
        expected = Model(*[lambda x: x * 1.5] * 3)(clean, x, sigma, conditions=("a", "b")[:batch])
        assert torch.equal(spoiled(dirty, [in_place] * 3, x, sigma), expected)
    assert dirty.report.strip == clean.report.strip
    assert [e.change for e in dirty.report.evaluations] == [e.change for e in clean.report.evaluations]


@pytest.mark.parametrize("predictor", [{}, {"predictor": "taylor", "order": 2}])
def test_easycache_owns_its_tensors(predictor: dict[str, Any]) -> None:
    settings = recipe("easycache", threshold=0.4, last=False, **predictor)

    def evaluate(run: Session, x: Tensor, sigma: float, *, spoil: bool) -> Tensor:
        entered = run.enter(("a",), x, sigma=sigma)
        given, inner = x.clone(), []

        def model() -> Tensor:
            inner.append(given * given)
            return inner[0]

        out = gate_model(entered, given, model)
        run.leave(entered)
        found = out.clone()
        if spoil:
            for tensor in (out, given, *inner):
                tensor.fill_(float("nan"))
        return found

    clean, dirty = session(settings), session(settings)
    for i, sigma in enumerate(SIGMAS[:-1]):
        x = X + 0.05 * i
        assert torch.equal(evaluate(dirty, x, sigma, spoil=True), evaluate(clean, x, sigma, spoil=False))
    assert "." in clean.report.strip and dirty.report.strip == clean.report.strip


def test_easycache_follows_its_published_rule() -> None:
    # Arithmetic by hand: v = x * x on inputs that fall; the rate is |dv| / |dx| of the last two computed.
    run = session(
        recipe("easycache", threshold=0.35, first=False, last=False), sigmas=[1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0]
    )
    inputs, total, rate, came, strip = [4.0, 3.6, 3.3, 3.1, 2.8, 2.4, 2.3], 0.0, None, None, ""
    computed: tuple[float, float] | None = None
    for i, value in enumerate(inputs):
        x = torch.full((1, 2, 2), value)
        entered = run.enter(("a",), x, sigma=1 - i / 10)
        gate_model(entered, x, lambda x=x: x * x)  # type: ignore[misc]
        run.leave(entered)
        reuse = False
        if rate is not None and came is not None and computed is not None:
            total += rate * abs(value - came) / computed[1]
            reuse = total < 0.35
        came = value
        if not reuse:
            total = 0.0
            if computed is not None:
                rate = abs(value * value - computed[1]) / abs(value - computed[0])
            computed = (value, value * value)
        strip += "." if reuse else "C"
    assert run.report.strip == strip
    assert "." in strip and "C" in strip[3:]


class Syncs(TorchDispatchMode):
    """Counts every time that a value is read off its device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        (recipe("schedule", steps=[0, 2], predictor="taylor"), 0),
        (recipe("interval", every=3, predictor="chebyshev"), 0),
        (recipe("magcache", ratios=[1.0] * 5), 0),
        (recipe(skip={"single": [0]}), 0),
        (recipe("fbcache", threshold=0.5), 1),
        (recipe("fbcache", threshold=0.0), 1),
        (recipe("teacache", threshold=0.5), 1),
        (recipe("mbcache", threshold=0.0), 2),
    ],
)
def test_an_evaluation_synchronises_once_at_most_and_a_fixed_schedule_never(
    settings: dict[str, Any], most: int
) -> None:
    run, model = session(settings), doubling()
    for i, sigma in enumerate(SIGMAS[:-1]):
        with Syncs() as syncs:
            model(run, torch.cat([X, X + i]), sigma, conditions=("a", "b"))
        # First and last are known beforehand; a change that cannot matter is not read.
        assert syncs.count <= (0 if i in (0, 4) else most)
    if most:
        assert any(e.change is not None for e in run.report.evaluations)


MIB = 2**20
IMAGE, LATENT = 16 * 32, 16 * 64  # numbers in the image stream, and in the latents, of a 64x64 picture


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        (recipe(), 0),
        (recipe("fbcache", threshold=0.1), 2 * IMAGE),
        (recipe("fbcache", threshold=0.1, signal="output"), 2 * IMAGE),
        (recipe("fbcache", threshold=0.1, predictor="taylor", order=2), 4 * IMAGE),
        (recipe("mbcache", threshold=0.1), 2 * 2 * IMAGE),
        (recipe("mbcache", threshold=0.1, predictor="taylor", order=1), 2 * 3 * IMAGE),
        (recipe("teacache", threshold=0.1), 2 * IMAGE),
        (recipe("magcache", ratios=[1.0, 1.1]), IMAGE),
        (recipe("interval", every=2), IMAGE),
        (recipe("interval", every=2, predictor="taylor", order=1), 2 * IMAGE),
        (recipe("interval", every=1, predictor="chebyshev", window=5), 5 * IMAGE),
        (recipe("schedule", steps=[0], predictor="weights", weights=[[1.0]] * 6), IMAGE),
        (recipe("easycache", threshold=0.1), 4 * LATENT),
        (recipe("easycache", threshold=0.1, predictor="taylor", order=2), 6 * LATENT),
    ],
    ids=str,
)
@pytest.mark.parametrize("given", [{}, {"negative": 2}, {"batch": 2}])
def test_memory_is_the_window_and_what_is_compared(
    settings: dict[str, Any], numbers: int, given: dict[str, Any]
) -> None:
    _, report = hastened(flux(), settings, **prompt(**given))
    expected = numbers * 4 * (2 if given else 1) / MIB
    assert report.cache_mib == pytest.approx(expected)
    assert report.cache_mib_planned == pytest.approx(expected)


def test_what_is_planned_is_never_less_than_what_is_kept() -> None:
    for settings in (
        recipe("interval", every=4, predictor="chebyshev"),
        recipe("fbcache", predictor="taylor", order=2),
    ):
        _, report = hastened(flux(), settings, steps=4)
        assert 0 < report.cache_mib <= report.cache_mib_planned
    # Known already at the first evaluation, before it is needed.
    run = session(recipe("interval", every=1, predictor="taylor", order=2))
    doubling()(run, X, 1.0)
    assert run.report.cache_mib_planned == pytest.approx(3 * X.numel() * 4 / MIB)
    assert run.report.cache_mib == pytest.approx(X.numel() * 4 / MIB)


@pytest.mark.parametrize(("dtype", "size"), [("model", 2), ("float32", 4)])
def test_deltas_may_be_kept_in_float32(dtype: str, size: int) -> None:
    model, inputs = transformer().to(torch.bfloat16), model_inputs()
    inputs = {k: v.to(torch.bfloat16) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    handle = hasten.apply(model, recipe("fbcache", threshold=10.0, last=False, dtype=dtype, device="cpu"))
    with handle.run(SIGMAS):
        outs = [call(model, inputs, sigma, dtype=torch.bfloat16) for sigma in SIGMAS[:3]]
    assert outs[2].dtype == torch.bfloat16 and bool(outs[2].isfinite().all())
    report = handle.reports[-1]
    assert report.strip == "C.."
    assert report.cache_mib == pytest.approx(IMAGE * (size + 2) / MIB)


def test_a_watch_sees_each_computed_delta_before_it_is_remembered() -> None:
    seen = []

    def watch(moment: Any, history: Any, delta: Tensor) -> None:
        seen.append((moment.interval, len(history.deltas), delta.clone()))

    loaded = Recipe.load(recipe("interval", every=2, last=False))
    run = Session(loaded, make_plan(loaded, flux_anatomy(2, 1)), SIGMAS, watch=watch)
    for sigma in SIGMAS[:-1]:
        doubling()(run, X, sigma)
    assert [(interval, known) for interval, known, _ in seen] == [(0, 0), (2, 1), (4, 1)]
    assert all(torch.equal(delta, 7 * X) for _, _, delta in seen)


def test_conditions_are_held_so_that_their_keys_stay_their_own() -> None:
    run = session(recipe())
    keys = {run.identity(noise(1, 2, seed=i)) for i in range(100)}
    assert len(keys) == 100


def test_a_model_may_be_called_with_gradients() -> None:
    model, inputs = transformer(), model_inputs()
    for settings in (METHODS["fbcache"], METHODS["teacache"], recipe("easycache", threshold=10.0), METHODS["interval"]):
        handle = hasten.apply(model, settings)
        with handle.run(SIGMAS):
            for sigma in SIGMAS[:-1]:
                out = model(timestep=torch.tensor([sigma]), **inputs)[0]
                assert bool(out.isfinite().all())
        handle.remove()
        assert handle.reports[-1].reused > 0
