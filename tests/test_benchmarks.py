"""What the benchmark's figures stand on: its yardsticks, its rival solvers, its fits, and the table it writes."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import fitting  # noqa: E402
import flux_nano  # noqa: E402
import grid  # noqa: E402
import measuring  # noqa: E402
import plot  # noqa: E402
import record  # noqa: E402
import rivals  # noqa: E402

from hasten.recipe import Recipe  # noqa: E402


def test_psnr_is_twenty_decibels_at_a_tenth_and_infinite_at_nothing() -> None:
    flat = torch.full((2, 3, 16, 16), 0.5)
    moved = flat.clone()
    moved[0] += 0.1
    found = measuring.psnr(moved, flat)
    assert found[0] == pytest.approx(20.0, abs=1e-3)
    assert torch.isinf(found[1])


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, 32, 32, generator=generator)
    noisy = (pictures + 0.2 * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)
    assert measuring.ssim(pictures, pictures).tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    assert measuring.ssim(noisy, pictures).max() < 0.98


def solve(scheduler: object, steps: int) -> float:
    """x at sigma 0 of dx/dsigma = x cos(3 sigma) from x = 1 at sigma 1, in float64."""
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), mu=0.5)  # type: ignore[attr-defined]
    x = torch.ones(1, dtype=torch.float64)
    for timestep in scheduler.timesteps:  # type: ignore[attr-defined]
        sigma = float(timestep) / 1000.0
        x = scheduler.step(x * math.cos(3 * sigma), timestep, x, return_dict=False)[0].double()  # type: ignore[attr-defined]
    return float(x)


@pytest.mark.parametrize("kind", [rivals.AdamsBashforth2, rivals.DpmSolver2M])
def test_second_order_rivals_err_less_than_euler_and_fall_faster(kind: type) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    exact = math.exp(-math.sin(3.0) / 3.0)
    config = {"use_dynamic_shifting": True}
    coarse, fine = (abs(solve(kind(**config), n) - exact) for n in (20, 40))
    euler = abs(solve(FlowMatchEulerDiscreteScheduler(**config), 40) - exact)
    assert fine < euler / 3
    assert coarse / fine > 2.5  # first order would halve it


def test_a_rival_leaves_the_pipeline_its_own_scheduler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Pipe:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)

    before = Pipe.scheduler
    with rivals.FewerSteps(7, "dpm++ 2m").on(Pipe):
        assert isinstance(Pipe.scheduler, rivals.DpmSolver2M)
        assert Pipe.scheduler.config.use_dynamic_shifting
    assert Pipe.scheduler is before


def straight_calibration() -> fitting.Calibration:
    """Deltas a + b sigma + c sigma^2, whose Gram matrix is known."""
    sigmas = np.linspace(1.0, 0.1, 10)
    a, b, c = torch.randn(3, 500, generator=torch.Generator().manual_seed(1), dtype=torch.float64).numpy()
    deltas = a + np.outer(sigmas, b) + np.outer(sigmas**2, c)
    return fitting.Calibration(tuple([1.0] * 10), deltas @ deltas.T, tuple(sigmas))


def test_fitted_weights_are_taylors_where_taylor_is_exact() -> None:
    from hasten.predict import newton_weights

    measured = straight_calibration()
    rows = fitting.fitted_weights(measured, [0, 1, 2, 5, 9], window=3, pull=1e-3)
    assert len(rows) == 5
    sigmas = measured.sigmas
    assert rows[0] == pytest.approx(newton_weights([sigmas[i] for i in (0, 1, 2)], sigmas[3], 2), abs=1e-4)


def test_fitted_weights_never_do_worse_than_taylor_on_what_they_were_fitted_to() -> None:
    from hasten.predict import newton_weights

    rng = np.random.default_rng(2)
    deltas = np.cumsum(rng.standard_normal((10, 300)), axis=0)
    measured = fitting.Calibration(tuple([1.0] * 10), deltas @ deltas.T, tuple(np.linspace(1.0, 0.1, 10)))
    row = fitting.fitted_weights(measured, [0, 2, 4, 5, 6, 7, 8, 9], window=3, pull=0.0)[0]
    taylor = newton_weights([measured.sigmas[0]], measured.sigmas[1], 2)

    def error(weights: list[float]) -> float:
        return float(np.square(weights[0] * deltas[0] - deltas[1]).sum())

    assert error(row) <= error(taylor)


def test_a_step_without_a_past_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="compute step 0"):
        fitting.fitted_weights(straight_calibration(), [1, 9], window=3, pull=0.0)


def test_every_row_has_its_own_name_and_a_recipe_that_loads() -> None:
    rows = grid.all_rows(28)
    assert len({row.name for row in rows}) == len(rows)
    measured = fitting.Calibration(tuple([1.0] * 28), np.eye(28) + 0.5, tuple(np.linspace(1.0, 0.05, 28)))
    for row in rows:
        method = row.make(measured)
        if isinstance(method, grid.Accelerated):
            Recipe.load(method.recipe)


def test_every_method_of_the_engine_has_a_row() -> None:
    from hasten.recipe import METHODS

    named = " ".join(row.method for row in grid.all_rows(28))
    assert [method for method in METHODS if method not in named] == []


def test_the_table_has_exactly_the_columns_that_the_readme_names() -> None:
    assert record.COLUMNS == [
        "host", "device", "dtype", "size", "steps", "batch", "method", "knob", "predictor", "evaluations", "wall_s",
        "baseline_wall_s", "psnr_db", "ssim", "psnr_converged_db", "checked", "cache_mib",
    ]  # fmt: skip


def test_a_partial_file_that_was_cut_short_keeps_its_whole_lines(tmp_path: Path) -> None:
    partial = tmp_path / "rows.jsonl"
    partial.write_text('{"name": "a", "psnr_db": 1.0}\n{"name": "b", "ps', encoding="utf-8")
    assert list(record.finished(partial)) == ["a"]


def test_a_later_measurement_of_a_row_replaces_the_earlier_one_and_keeps_the_others(tmp_path: Path) -> None:
    settings = measuring.Settings(model="nowhere")
    partial = tmp_path / "rows.jsonl"
    rows = [row for row in grid.all_rows(28) if row.method == "fewer steps"][:2]
    figures = '"device": "here", "steps": 20, "evaluations": 20.0, "wall_s": 1.0, "baseline_wall_s": 2.0, '
    figures += '"psnr_db": %s, "ssim": 0.5, '
    figures += '"psnr_converged_db": null, "checked": 1.0, "cache_mib": null}\n'
    lines = [f'{{"name": "{row.name}", ' + figures % psnr for row, psnr in zip(rows, ("30.0", "Infinity"), strict=True)]
    partial.write_text("".join(lines), encoding="utf-8")
    plan = record.Plan(settings, True, True, tmp_path, partial)
    record.write_table(plan, rows, record.finished(partial), keep_others=False)
    record.write_table(plan, rows[:1], record.finished(partial), keep_others=True)
    with (tmp_path / "flux_nano.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["psnr_db"] for row in table] == ["30", "inf"]
    assert list(table[0]) == record.COLUMNS
    assert table[0]["psnr_converged_db"] == "" and table[0]["device"] == "here"


def test_pictures_and_seconds_of_two_machines_stand_in_one_row(tmp_path: Path) -> None:
    settings = measuring.Settings(model="nowhere")
    rows = [row for row in grid.all_rows(28) if row.method == "fewer steps"][:1]
    drawn = {"device": "one", "steps": 20, "evaluations": 20.0, "psnr_db": 30.0, "ssim": 0.5}
    drawn |= {"psnr_converged_db": None, "checked": 1.0}
    timed = {"device": "two", "steps": 20, "wall_s": 1.0, "baseline_wall_s": 2.0, "cache_mib": None}
    name = rows[0].name
    record.write_table(
        record.Plan(settings, True, False, tmp_path, tmp_path / "a"), rows, {name: drawn}, keep_others=False
    )
    record.write_table(
        record.Plan(settings, False, True, tmp_path, tmp_path / "b"), rows, {name: timed}, keep_others=True
    )
    with (tmp_path / "flux_nano.csv").open(newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    assert row["device"] == "pictures: one; seconds: two"
    assert (row["psnr_db"], row["wall_s"], row["evaluations"]) == ("30", "1", "20")


@pytest.mark.slow
def test_a_quick_run_writes_the_table_and_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import make_tiny_flux

    pytest.importorskip("matplotlib")
    model = make_tiny_flux(tmp_path / "tiny", double=3, single=5)
    monkeypatch.setattr(flux_nano, "CACHE", tmp_path / "cache")
    command = ["flux_nano.py", "--quick", "--model", str(model), "--size", "32x32", "--prompts", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "10", "--only", "interval/every=3"])
    flux_nano.main()
    table = plot.read(tmp_path / "cache" / "quick" / "flux_nano.csv")
    assert {row["predictor"] for row in table} == {"hold", "taylor1", "taylor2", "chebyshev"}
    assert {row["evaluations"] for row in table} == {"4"}
    assert (tmp_path / "cache" / "quick" / "flux_nano.png").stat().st_size > 10_000
