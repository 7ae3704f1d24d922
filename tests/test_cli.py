"""Every command's happy and unhappy path: what stands on stdout and stderr, the exit code, and which files are left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import make_tiny_flux
from typer.testing import CliRunner, Result

import hasten
from hasten.cli import app
from hasten.painter import FluxPainter

SMALL = ["--steps", "4", "--size", "32x32", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_flux(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "half.toml"
    path.write_text('schema = 1\ndescription = "Every second."\n[cache]\nmethod = "interval"\nevery = 2\n')
    return str(path)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def hasten_command(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def one_sentence(result: Result, code: int = 2) -> str:
    """The sentence on stderr: one line, and nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    sentence = result.stderr.strip()
    assert sentence.startswith("hasten: ") and "\n" not in sentence and "Traceback" not in sentence
    return sentence


def test_generate_draws_a_picture_and_says_what_happened(model: str, recipe: str, tmp_path: Path) -> None:
    out, report = tmp_path / "apple.png", tmp_path / "report.json"
    words = ["generate", "a red apple", "--model", model, "--recipe", recipe, *SMALL]
    result = hasten_command(*words, "--out", str(out), "--report", str(report), "--batch", "2", "--seed", "5")
    assert result.exit_code == 0, result.output
    assert "computed 3 of 4" in result.stdout
    with Image.open(out) as image:
        assert image.size == (32, 32)
    assert (tmp_path / "apple-2.png").is_file()
    written = json.loads(report.read_text())
    assert (written["computed"], written["reused"], written["seed"]) == (3, 1, 5)
    assert [e["decision"] for e in written["evaluations"]] == ["compute", "reuse", "compute", "compute"]


def test_generate_compares(model: str, recipe: str, tmp_path: Path) -> None:
    words = ["generate", "a red apple", "--model", model, "--recipe", recipe, *SMALL, "--compare", "--json"]
    result = hasten_command(*words)
    assert result.exit_code == 0, result.output
    plain = json.loads(result.stdout)
    assert plain["files"] == ["hasten.png"] and Path("hasten.png").is_file()
    assert plain["fewer_steps"]["steps"] == 3
    assert plain["psnr_db"] > 20 and 0 < plain["ssim"] <= 1


def test_generate_keeps_what_it_compares_with(model: str, recipe: str) -> None:
    words = ["generate", "a red apple", "--model", model, "--recipe", recipe, *SMALL, "--batch", "2", "--keep"]
    assert "--compare" in one_sentence(hasten_command(*words))
    result = hasten_command(*words, "--compare", "--out", "apple.png")
    assert result.exit_code == 0, result.output
    names = [f"apple{what}{number}.png" for what in ("", "-uncached", "-fewer") for number in ("", "-2")]
    assert sorted(str(path) for path in Path().iterdir()) == sorted(names)
    assert result.stdout.split()[-6:] == names
    with Image.open("apple-uncached-2.png") as image:
        assert (image.info["steps"], image.info["seed"]) == ("4", "1") and "interval" not in image.info["recipe"]
    with Image.open("apple-fewer.png") as image:
        assert image.info["steps"] == "3"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps", "abc"], "--steps is 'abc': give a whole number."),
        (["--steps=2.5"], "--steps is '2.5': give a whole number."),
        (["--seed", "x"], "--seed is 'x': give a whole number such as 0."),
        (["--guidance", "much"], "--guidance is 'much': give a number."),
        (["--threads", "0"], "--threads is '0': give 1 or more."),
    ],
)
def test_a_value_that_is_no_number_is_one_sentence(words: list[str], sentence: str) -> None:
    assert one_sentence(hasten_command("generate", "a red apple", *words)).startswith(f"hasten: {sentence}")


def test_quiet_says_nothing(model: str, tmp_path: Path) -> None:
    result = hasten_command("generate", "a red apple", "--model", model, "--recipe", "none", *SMALL, "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_a_cut_prompt_is_remarked(model: str) -> None:
    result = hasten_command("generate", "red apple " * 40, "--model", model, "--recipe", "none", *SMALL)
    assert result.exit_code == 0 and "the prompt was cut" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "0x256"], "the width is 0: at least 16 is allowed"),
        (["--size", "250x256"], "the width is 250: it must be divisible by 16"),
        (["--size", "big"], "the size is 'big'"),
        (["--steps", "0"], "steps is 0"),
        (["--steps", "1000000000"], "steps is 1000000000: at most"),
        (["--batch", "99999999999"], "batch is 99999999999: at most"),
        (["--batch", "0"], "batch is 0"),
        (["--seed", "-3"], "the seed is -3"),
        (["--recipe", "balancd"], "did you mean 'balanced'"),
        (["--recipe", "nowhere.toml"], "there is no recipe file"),
        (["--device", "tpu"], "there is no device 'tpu'"),
        (["--dtype", "int3"], "there is no dtype 'int3'"),
        (["--model", "nonsense"], "there is no model 'nonsense'"),
        (["--model", "x.safetensors"], "there is no file x.safetensors"),
        (["--out", "picture.jpg"], "does not end in .png"),
        (["--vae", "x.safetensors"], "the transformer is missing"),
    ],
)
def test_bad_input_is_one_sentence(model: str, options: list[str], words: str) -> None:
    given = options if options[0] in ("--model", "--vae") else ["--model", model, *options]
    if "balancd" in options and "balanced" not in hasten.recipe_names():
        pytest.skip("no recipes yet")
    result = hasten_command("generate", "a red apple", *given)
    assert words in one_sentence(result)
    assert list(Path().iterdir()) == []


def test_a_package_that_is_missing_is_one_sentence(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    Image.new("RGB", (32, 32), "red").save("a.png")
    Image.new("RGB", (32, 32), "blue").save("b.png")
    assert "a package is missing or does not fit" in one_sentence(hasten_command("compare", "a.png", "b.png"))


def test_a_broken_folder_is_one_sentence(model: str, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text("{")
    result = hasten_command("generate", "x", "--model", str(broken), "--recipe", "none", *SMALL)
    assert "is no index of weights" in one_sentence(result)


def test_an_output_folder_that_cannot_be_written_is_found_before_anything_is_drawn(model: str) -> None:
    Path("file").write_text("")
    result = hasten_command("generate", "x", "--model", "nonsense", "--recipe", "none", "--out", "file/a.png")
    assert "file is a file" in one_sentence(result)


def test_a_missing_prompt_is_bad_input() -> None:
    result = hasten_command("generate")
    assert result.exit_code == 2 and "prompt" in result.stderr.lower()


def test_ctrl_c_leaves_nothing(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FluxPainter, "paint", interrupted)
    result = hasten_command("generate", "x", "--model", model, "--recipe", "none", *SMALL)
    assert result.exit_code == 130
    assert "hasten: interrupted; nothing was written." in result.stderr
    assert list(Path().iterdir()) == []


def test_running_out_of_memory_is_one_sentence(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB.\nSee documentation")

    monkeypatch.setattr(FluxPainter, "paint", full)
    result = hasten_command("generate", "x", "--model", model, "--recipe", "none", *SMALL, "--quiet")
    assert "ran out of memory" in one_sentence(result)


def test_compare_shows_recipes_and_writes_a_sheet(model: str, recipe: str) -> None:
    words = ["compare", "a red apple", "--model", model, "--recipe", recipe, "--recipe", "none", *SMALL]
    result = hasten_command(*words, "--out", "sheet.png")
    assert result.exit_code == 0, result.output
    for word in ("uncached", "half", "none", "3 of 4", "4 of 4", "sheet.png"):
        assert word in result.stdout
    assert Path("sheet.png").read_bytes().startswith(b"\x89PNG")
    plain = json.loads(hasten_command(*words, "--json").stdout)
    assert [line["name"] for line in plain["averages"]] == ["uncached", "half", "none"]


def test_compare_holds_two_files_against_each_other() -> None:
    Image.new("RGB", (32, 32), "red").save("a.png")
    Image.new("RGB", (32, 32), "blue").save("b.png")
    Image.new("RGB", (16, 32), "blue").save("c.png")
    assert "PSNR" in hasten_command("compare", "a.png", "b.png").stdout
    same = json.loads(hasten_command("compare", "a.png", "a.png", "--json").stdout)
    assert same["psnr_db"] is None and same["identical"] is True
    assert "unequal sizes" in one_sentence(hasten_command("compare", "a.png", "c.png"))
    assert "no picture file none.png" in one_sentence(hasten_command("compare", "a.png", "none.png"))
    assert "not 3" in one_sentence(hasten_command("compare", "a", "b", "c"))


def test_demo_says_where_its_page_lies(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "fast.toml").write_text('schema = 1\n[cache]\nmethod = "interval"\nevery = 3\n')
    monkeypatch.setattr("hasten.recipe.recipe_folder", lambda: folder)
    monkeypatch.setattr("hasten.demo.QUICK_STEPS", 4)
    monkeypatch.setattr("hasten.demo.QUICK_SIDE", 32)
    result = hasten_command("demo", "--model", model, "--device", "cpu", "--out", "shown")
    assert result.exit_code == 0, result.output
    assert "fast" in result.stdout and "shown/index.html" in result.stdout
    assert Path("shown/index.html").is_file() and Path("shown/contact-sheet.png").is_file()
    plain = json.loads(hasten_command("demo", "--model", model, "--device", "cpu", "--json").stdout)
    assert plain["page"] == "out/demo/index.html" and len(plain["showings"]) == 2


def test_demo_refuses_a_folder_that_is_a_file() -> None:
    Path("file").write_text("")
    assert "is a file" in one_sentence(hasten_command("demo", "--out", "file"))


CALIBRATE = ["calibrate", "a red apple", "a green ball", "--steps", "3", "--size", "32x32", "--device", "cpu"]


def test_calibrate_writes_a_recipe_that_can_be_drawn_with(model: str) -> None:
    result = hasten_command(*CALIBRATE, "--model", model, "--out", "mine/mag.toml")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == "mine/mag.toml"
    found = hasten.Recipe.load("mine/mag.toml")
    assert found.cache.method == "magcache" and found.cache.ratios[0] == 1.0 and len(found.cache.ratios) == 3
    assert "2 prompts, 32x32, 3 steps, float32" in found.description
    drawn = hasten_command("generate", "a red apple", "--model", model, "--recipe", "mine/mag.toml", *SMALL)
    assert drawn.exit_code == 0, drawn.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "found.png"], "does not end in .safetensors: give a name such as found.safetensors"),
        (["--out", "found.safetensors", "--l1", "0.1", "--pv-l1", "0.1"], "pv_l1 must be above l1"),
        (["--out", "found.safetensors", "--l1", "much"], "--l1 is 'much': give a number such as 0.06."),
        (["--out", "file/found.safetensors"], "is a file; choose another folder"),
    ],
)
def test_tune_attention_refuses_before_anything_is_loaded(options: list[str], words: str) -> None:
    Path("file").write_text("")
    assert words in one_sentence(hasten_command("tune-attention", *options))
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_calibrate_prints_its_recipe_where_no_file_is_named(model: str) -> None:
    result = hasten_command(*CALIBRATE, "--model", model)
    assert result.exit_code == 0, result.output
    assert 'method = "magcache"' in result.stdout
    plain = json.loads(hasten_command(*CALIBRATE, "--model", model, "--json").stdout)
    assert plain["file"] is None and len(plain["recipe"]["cache"]["ratios"]) == 3
    quiet = hasten_command(*CALIBRATE, "--model", model, "--quiet", "--out", "mag.toml")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "") and Path("mag.toml").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "1"], "steps is 1: calibration compares each step with the one before"),
        (["--out", "mag.json"], "does not end in .toml"),
        (["--size", "30x32"], "the width is 30"),
        (["--model", "nonsense"], "there is no model 'nonsense'"),
    ],
)
def test_calibrate_says_what_is_wrong_before_it_loads_anything(options: list[str], words: str) -> None:
    assert words in one_sentence(hasten_command("calibrate", "a red apple", *options))
    assert "the prompt is empty" in one_sentence(hasten_command("calibrate", "a red apple", " "))
    assert list(Path().iterdir()) == []


def test_an_interrupted_calibration_leaves_the_old_recipe(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    Path("mag.toml").write_text("schema = 1\n")
    monkeypatch.setattr("hasten.calibrate.calibrate", interrupted)
    result = hasten_command(*CALIBRATE, "--model", model, "--out", "mag.toml")
    assert result.exit_code == 130
    assert [(path.name, path.read_text()) for path in Path().iterdir()] == [("mag.toml", "schema = 1\n")]


def test_recipes_are_listed_and_printed(recipe: str) -> None:
    listed = json.loads(hasten_command("recipes", "--json").stdout)
    assert [line["name"] for line in listed] == hasten.recipe_names()
    assert hasten_command("recipes").exit_code == 0
    printed = hasten_command("recipes", recipe)
    assert 'method = "interval"' in printed.stdout and 'description = "Every second."' in printed.stdout
    assert json.loads(hasten_command("recipes", recipe, "--json").stdout)["cache"]["every"] == 2
    assert "there is no recipe named 'nonsense'" in one_sentence(hasten_command("recipes", "nonsense"))


def test_doctor_prints_every_room() -> None:
    result = hasten_command("doctor")
    assert result.exit_code == 0, result.output
    for word in ("torch", "diffusers", "float32", "sdpa math", "hasten can draw here"):
        assert word in result.stdout
    assert json.loads(hasten_command("doctor", "--json").stdout)["ready"] is True


def test_version_and_help() -> None:
    assert hasten_command("--version").stdout.strip() == hasten.__version__
    for command in ("generate", "compare", "demo", "calibrate", "recipes", "doctor"):
        assert command in hasten_command("--help").stdout
        assert hasten_command(command, "--help").exit_code == 0


def test_the_front_door_imports_nothing_heavy() -> None:
    code = "import sys, hasten.cli; sys.exit(sorted({'torch', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)) or 0)"
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert done.returncode == 0
