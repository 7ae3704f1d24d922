"""The report file has its keys, the PNG its story, a batch its names; files are there whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import FakePainter
from PIL import Image

import hasten
from hasten.generate import check_outputs, generate, picture_paths, write_outcome
from hasten.output import check_folder, check_writable, write_files
from hasten.painter import Request
from hasten.recipe import Recipe

REQUEST = Request("a red apple, déjà vu 🍎", steps=8, width=32, height=48, seed=7, guidance=2.5)
KEYS = [
    *("schema", "version", "model", "device", "dtype", "size", "steps", "seed", "recipe"),
    *("evaluations", "computed", "reused", "wall_s", "cache_mib"),
]
COMPARED = [*KEYS, "baseline_wall_s", "speedup", "psnr_db", "ssim", "fewer_steps"]
EVALUATION = ["index", "interval", "sigma", "lanes", "decision", "change", "block", "reason", "ms"]


def test_the_report_has_exactly_its_keys() -> None:
    report = generate(FakePainter({"half": 4}), REQUEST, Recipe(name="half")).report
    assert list(report) == KEYS
    assert (report["schema"], report["version"], report["size"]) == (1, hasten.__version__, "32x48")
    assert (report["computed"], report["reused"], len(report["evaluations"])) == (4, 4, 8)
    assert list(report["evaluations"][0]) == EVALUATION


def test_a_comparison_adds_exactly_its_keys() -> None:
    painter = FakePainter({"half": 4}, wall_s={8: 6.0, 4: 2.0})
    report = generate(painter, REQUEST, Recipe(name="half"), compare=True).report
    assert list(report) == COMPARED
    assert list(report["fewer_steps"]) == ["steps", "wall_s", "psnr_db", "ssim"]
    assert report["fewer_steps"]["steps"] == 4
    assert (report["baseline_wall_s"], report["wall_s"], report["speedup"]) == (6.0, 2.0, 3.0)
    assert painter.steps_drawn[0] == 1  # the warm-up, outside the clock


def test_identical_pictures_are_null_and_said_to_be_identical() -> None:
    report = generate(FakePainter(), REQUEST, Recipe.load("none"), compare=True).report
    assert report["psnr_db"] is None and report["identical"] is True
    assert report["fewer_steps"] | {"wall_s": 0} == {
        "steps": 8,
        "wall_s": 0,
        "psnr_db": None,
        "ssim": 1.0,
        "identical": True,
    }
    json.dumps(report, allow_nan=False)


def test_a_picture_tells_how_to_draw_it_again(tmp_path: Path) -> None:
    out, report = tmp_path / "new" / "apple.png", tmp_path / "new" / "report.json"
    recipe = Recipe.load({"schema": 1, "name": "mine", "cache": {"method": "interval", "every": 2}})
    outcome = generate(FakePainter({"mine": 4}), REQUEST, recipe)
    assert write_outcome(outcome, FakePainter(), REQUEST, recipe, out=out, report=report) == [out, report]
    with Image.open(out) as image:
        texts = dict(image.text)  # type: ignore[attr-defined]
    assert texts["prompt"] == REQUEST.prompt
    assert (texts["seed"], texts["steps"], texts["guidance"], texts["size"]) == ("7", "8", "2.5", "32x48")
    assert (texts["version"], texts["model"]) == (hasten.__version__, "fake")
    assert Recipe.load(json.loads(texts["recipe"])) == recipe
    assert json.loads(report.read_text()) == outcome.report


def test_a_batch_has_a_file_and_a_seed_for_each_picture(tmp_path: Path) -> None:
    request = Request("x", steps=2, width=16, height=16, seed=3, batch=3)
    recipe = Recipe.load("none")
    outcome = generate(FakePainter(), request, recipe)
    paths = write_outcome(outcome, FakePainter(), request, recipe, out=tmp_path / "a.png", report=None)
    assert [path.name for path in paths] == ["a.png", "a-2.png", "a-3.png"]
    seeds = []
    for path in paths:
        with Image.open(path) as image:
            seeds.append(image.text["seed"])  # type: ignore[attr-defined]
    assert seeds == ["3", "4", "5"]


def test_outputs_are_judged_before_the_work(tmp_path: Path) -> None:
    check_outputs(tmp_path / "deep" / "er" / "a.png", tmp_path / "r.json", 2)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is a file; choose another folder"):
        check_outputs(tmp_path / "file" / "a.png", None, 1)
    with pytest.raises(ValueError, match=r"does not end in \.png"):
        check_outputs(tmp_path / "a.jpg", None, 1)
    with pytest.raises(ValueError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(ValueError, match=r"ends in \.png: it is JSON"):
        check_outputs(tmp_path / "a.png", tmp_path / "r.png", 1)


def test_a_folder_that_refuses_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write anywhere, so a real one cannot be had
    with pytest.raises(OSError, match=r"cannot be written \(Permission denied\)"):
        check_folder(tmp_path)


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("before")
    (tmp_path / "wall").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        write_files({tmp_path / "a.txt": b"after", tmp_path / "wall" / "b.txt": b"never"})
    assert (tmp_path / "a.txt").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "wall"]
    write_files({tmp_path / "a.txt": b"after"})
    assert (tmp_path / "a.txt").read_text() == "after"


def test_names_of_a_batch_keep_their_folder() -> None:
    assert picture_paths(Path("x/a.b.png"), 2) == [Path("x/a.b.png"), Path("x/a.b-2.png")]
