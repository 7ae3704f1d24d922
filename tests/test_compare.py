"""PSNR and SSIM say what they should, rows and averages add up, and nonsense is refused in one sentence."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import FakePainter
from PIL import Image
from runs import flux, hastened, recipe

from hasten.compare import Likeness, compare_recipes, psnr_db, read_picture, ssim, warm_up, warming
from hasten.painter import Drawing, Request
from hasten.recipe import Recipe, Skip
from hasten.report import Report
from hasten.showing import Showing, averages, doubt


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)


def test_psnr_is_its_formula(noise: np.ndarray) -> None:
    other = noise.copy()
    other[..., 0] = 255 - other[..., 0]
    mse = np.mean((noise.astype(float) - other) ** 2)
    assert psnr_db(noise, other) == pytest.approx(10 * math.log10(255**2 / mse), abs=1e-3)


def test_identical_pictures_are_infinitely_near_and_wholly_similar(noise: np.ndarray) -> None:
    assert psnr_db(noise, noise) == math.inf
    assert ssim(noise, noise) == pytest.approx(1.0, abs=1e-6)


def test_pictures_and_arrays_are_read_alike(noise: np.ndarray) -> None:
    other = np.roll(noise, 3, axis=0)
    assert psnr_db(Image.fromarray(noise), Image.fromarray(other)) == psnr_db(noise, other)
    assert ssim(Image.fromarray(noise), other) == ssim(noise, other)


def test_a_batch_is_pooled(noise: np.ndarray) -> None:
    near, far = noise.copy(), 255 - noise
    near[0] ^= 1
    pooled = psnr_db(np.stack([noise, noise]), np.stack([near, far]))
    assert psnr_db(noise, far) < pooled < psnr_db(noise, near)


def test_more_noise_is_less_alike(noise: np.ndarray) -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    grey[16:48, 16:48] = 30
    rng = np.random.default_rng(1)
    steps = [np.clip(grey + rng.normal(0, s, grey.shape), 0, 255).astype(np.uint8) for s in (2, 10, 40)]
    assert sorted((ssim(grey, s) for s in steps), reverse=True) == [ssim(grey, s) for s in steps]


@pytest.mark.parametrize("measure", [psnr_db, ssim])
def test_unequal_sizes_are_refused(measure: object, noise: np.ndarray) -> None:
    with pytest.raises(ValueError, match="unequal sizes, 48x32 and 48x16"):
        measure(noise, noise[:16])  # type: ignore[operator]


def test_pictures_of_floats_are_compared_as_they_are(noise: np.ndarray) -> None:
    exact = noise.astype(np.float32) / 255
    other = noise[::-1].copy()
    assert psnr_db(exact, other.astype(np.float32) / 255) == pytest.approx(psnr_db(noise, other), abs=1e-4)
    near = np.clip(exact + np.float32(1e-4), 0, 1)  # far less than a level of 255
    assert psnr_db(near, exact) == pytest.approx(80, abs=0.1)


def test_likeness_is_measured_before_rounding_where_the_host_tells(noise: np.ndarray) -> None:
    exact = np.full((1, 16, 16, 3), 0.5, np.float32)
    images = [Image.fromarray(np.full((16, 16, 3), 128, np.uint8))]
    report = Report({}, 1)
    first, second = (Drawing(images, 1.0, report, exact=exact + np.float32(x)) for x in (0.0, 1e-4))
    assert Likeness.of(first, second).psnr_db == pytest.approx(80, abs=0.1)
    assert Likeness.of(first, Drawing(images, 1.0, report)).psnr_db is None


def test_only_colour_pictures_in_a_known_range_are_compared(noise: np.ndarray) -> None:
    with pytest.raises(ValueError, match="float32 from 0 to 1"):
        psnr_db(noise.astype(np.float32), noise)
    with pytest.raises(ValueError, match="shape"):
        psnr_db(noise[..., 0], noise)
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(noise[:8], noise[:8])


def test_what_is_identical_is_still_valid_json() -> None:
    plain = Likeness(None, 1.0).to_dict()
    assert plain == {"psnr_db": None, "ssim": 1.0, "identical": True}
    assert "identical" not in Likeness(30.0, 0.9).to_dict()
    json.dumps(plain, allow_nan=False)


def test_every_recipe_stands_beside_as_many_plain_steps() -> None:
    painter = FakePainter({"half": 4, "quarter": 2, "same": 4})
    recipes = [(name, Recipe(name=name)) for name in ("half", "quarter", "same")]
    rows = compare_recipes(painter, Request("x", steps=8), recipes)
    assert [row.kind for row in rows] == ["baseline", "recipe", "recipe", "recipe"]
    assert [row.fewer.steps for row in rows[1:] if row.fewer] == [4, 2, 4]
    assert rows[1].fewer is rows[3].fewer  # equal rivals are drawn once
    assert painter.steps_drawn == [8, 8, 4, 8, 2, 8]


def test_the_quickest_of_several_takes_counts() -> None:
    painter = FakePainter({"half": 4})
    paint, painted = painter.paint, []

    def slow_at_first(request: Request, recipe: Recipe, **more: object) -> Drawing:
        drawing = paint(request, recipe, **more)
        painted.append(replace(drawing, wall_s=drawing.wall_s * (3.0 if len(painted) % 2 == 0 else 1.0)))
        return painted[-1]

    painter.paint = slow_at_first  # type: ignore[method-assign]
    rows = compare_recipes(painter, Request("x", steps=8), [("half", Recipe(name="half"))], takes=2)
    assert painter.steps_drawn == [8, 8, 8, 8, 4, 4]
    assert [row.drawing.wall_s for row in rows] == [painted[1].wall_s, painted[3].wall_s]


def test_a_recipe_that_computes_everything_is_its_own_rival() -> None:
    rows = compare_recipes(FakePainter({"all": 8}), Request("x", steps=8), [("all", Recipe(name="all"))])
    assert rows[1].fewer is rows[0]
    assert rows[1].likeness.psnr_db is None


def test_progress_is_told_every_step() -> None:
    told: list[tuple[str, int, int]] = []
    recipes = [("half", Recipe(name="half"))]
    compare_recipes(FakePainter({"half": 1}), Request("x", steps=2), recipes, progress=lambda *step: told.append(step))
    assert told[:3] == [("nothing reused", 0, 2), ("nothing reused", 1, 2), ("nothing reused", 2, 2)]
    assert told[-1] == ("1 plain steps", 1, 1)


def test_averages_are_of_times_and_leave_identical_pictures_out() -> None:
    painter = FakePainter({"half": 4}, wall_s={8: 8.0, 4: 4.0})
    recipes = [("half", Recipe(name="half"))]
    showings = [
        Showing(r, compare_recipes(painter, r, recipes)) for r in (Request("x", steps=8), Request("y", steps=8))
    ]
    baseline, half = averages(showings)
    assert baseline.speedup == 1.0 and baseline.psnr_db is None
    assert half.speedup == pytest.approx(2.0)
    assert half.computed == 4 and half.fewer is not None and half.fewer.computed == 4
    json.dumps([half.to_dict(), showings[0].to_dict()], allow_nan=False)


def shown(*walls: dict[int, float], skip: bool = False) -> list[Showing]:
    """Pictures of eight steps beside half of them, one for each table of seconds by evaluations computed."""
    half = [("half", Recipe(name="half", skip=Skip(double=(1,)) if skip else Skip()))]
    request = Request("x", steps=8)
    return [Showing(request, compare_recipes(FakePainter({"half": 4}, wall_s=wall), request, half)) for wall in walls]


def test_times_that_no_recipe_explains_are_doubted() -> None:
    assert doubt(shown({8: 8.0, 4: 4.0}, {8: 9.0, 4: 4.0})) == ""
    assert "half 3.2x where 2.0x is the most" in doubt(shown({8: 8.0, 4: 2.5}))
    assert "8.0 to 13.0 s" in doubt(shown({8: 8.0, 4: 4.0}, {8: 13.0, 4: 6.5}))


def test_a_recipe_that_makes_steps_cheaper_may_save_more_time_than_evaluations() -> None:
    [showing] = shown({8: 8.0, 4: 2.5}, skip=True)
    assert doubt([Showing(showing.request, [showing.rows[0], replace(showing.rows[1], fewer=None)])]) == ""


def test_a_mean_says_how_many_identical_pictures_it_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    from hasten.screen import Screen

    half, all_of_it = FakePainter({"half": 4}), FakePainter({"half": 8})
    recipes = [("half", Recipe(name="half"))]
    showings = [
        Showing(request, compare_recipes(painter, request, recipes))
        for painter, request in ((half, Request("x", steps=8)), (all_of_it, Request("y", steps=8)))
    ]
    lines = averages(showings)
    assert lines[1].left_out == 1 and lines[1].psnr_db == showings[0].rows[1].likeness.psnr_db
    assert lines[1].psnr_words.endswith("dB, 1 identical left out")
    assert lines[1].to_dict()["left_out"] == 1
    Screen(quiet=False, as_json=False).table(lines, "here")
    out = " ".join(capsys.readouterr().out.split())
    assert f"{lines[1].psnr_db:.1f}*" in out and "*: without identical pictures, 1 at most." in out


def test_a_file_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no picture file"):
        read_picture(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match="not a picture"):
        read_picture(tmp_path / "text.png")


WARMED = {
    "hold": recipe("interval", every=3),
    "taylor": recipe("interval", every=3, predictor="taylor", order=2, start=0.2),
    "chebyshev": recipe("schedule", steps=[0, 2, 4], of=9, predictor="chebyshev", window=4),
    "weights": recipe("schedule", steps=[0, 1, 3], predictor="weights", weights=[[-1.0, 2.0], *[[0.2, 0.3, 0.5]] * 4]),
    "magcache": recipe("magcache", ratios=[1.0] * 9, max_consecutive_hits=2),
    "fbcache": recipe("fbcache", threshold=0.9, predictor="taylor", order=1, sigma_start=0.9),
    "mbcache": recipe("mbcache", thresholds=[0.01, 0.9], signal="output"),
    "teacache": recipe("teacache", threshold=9.0),
    "easycache": recipe("easycache", threshold=9.0),
}


@pytest.mark.parametrize("name", WARMED)
def test_the_warm_up_sums_as_many_deltas_as_what_is_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import hasten.call

    summed: list[int] = []
    whole = hasten.call.weighted_sum

    def watched(base: object, deltas: list[object], weights: list[float]) -> object:
        summed.append(len(weights))
        return whole(base, deltas, weights)  # type: ignore[arg-type]

    monkeypatch.setattr(hasten.call, "weighted_sum", watched)
    hastened(flux(), WARMED[name], steps=9)
    timed = set(summed)
    summed.clear()
    short, steps = warming(Recipe.load(WARMED[name]))
    _, report = hastened(flux(), short.to_dict(), steps=steps)
    assert timed <= set(summed) and timed and report.reused > 0
    assert steps <= 8


def test_recipes_that_are_warmed_alike_are_warmed_once_and_none_not_at_all() -> None:
    painter = FakePainter()
    shipped = [Recipe.load(name) for name in ("lossless", "balanced", "fast", "turbo", "none")]
    warm_up(painter, Request("x", steps=28), shipped)
    assert painter.steps_drawn == [1, 6, 2]  # Sana's own settings hold the newest delta
