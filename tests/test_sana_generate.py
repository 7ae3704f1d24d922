"""`hasten generate` and `hasten compare` with a Sana folder: the pipeline's own picture, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_sana import make_tiny_sana
from typer.testing import CliRunner

from hasten.cli import app
from hasten.loading import Habits, Model, check_model, habits, load_painter, model_label
from hasten.painter import Request
from hasten.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_sana(tmp_path_factory.mktemp("sana") / "tiny-sana", side=4)


def test_the_painter_draws_what_the_pipeline_draws(folder: Path) -> None:
    from diffusers import SanaPipeline

    painter = load_painter(Model(str(folder)), device=CPU, dtype=torch.float32)
    request = Request("a red ball", steps=2, width=128, height=96, seed=3, guidance=4.5, batch=2)
    drawn = painter.paint(request, Recipe.load("none")).images
    pipe = SanaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a red ball", num_inference_steps=2, width=128, height=96, guidance_scale=4.5, num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)], max_sequence_length=64,
        complex_human_instruction=None, use_resolution_binning=False,
    ).images  # fmt: skip
    for ours, theirs in zip(drawn, expected, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_what_is_left_out_is_sanas_own_habit(folder: Path) -> None:
    painter = load_painter(Model(str(folder)), device=CPU, dtype=torch.float32)
    assert habits(painter) == Habits(128, 64, steps=20, guidance=4.5)
    check_model(Model("sana-nano"))
    assert model_label(Model("sana-nano")) == "sana-nano"


def test_generate_compares_and_reports(folder: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "a.png", tmp_path / "a.json"
    command = ["generate", "a red ball", "--model", str(folder), "--recipe", "balanced", "--steps", "4", "--compare"]
    options = ["--size", "64x64", "--device", "cpu", "--out", str(out), "--report", str(report)]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    assert out.is_file() and "psnr_db" in json.loads(report.read_text())


def test_a_size_that_is_no_multiple_of_32_is_refused(folder: Path, tmp_path: Path) -> None:
    command = ["generate", "a ball", "--model", str(folder), "--size", "80x64", "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "a.png")])
    assert result.exit_code == 2
    assert "divisible by 32; try 64" in result.stderr.replace("\n", " ")


def test_a_large_picture_is_decoded_in_tiles(folder: Path) -> None:
    painter = load_painter(Model(str(folder)), device=CPU, dtype=torch.float32)
    seen, inner = [], painter.pipe.vae.decoder.forward
    painter.pipe.vae.decoder.forward = lambda z: seen.append(tuple(z.shape[-2:])) or inner(z)
    for width in (2048, 2080, 2048):
        image = painter.paint(Request("a ball", steps=1, width=width, height=32), Recipe.load("none")).images[0]
        assert image.size == (width, 32)
    assert seen == [(1, 64), (1, 32), (1, 32), (1, 9), (1, 64)] and not painter.pipe.vae.use_tiling


def test_what_gemma_does_not_read_is_said(folder: Path) -> None:
    painter = load_painter(Model(str(folder)), device=CPU, dtype=torch.float32)
    notes = painter.paint(Request("x" * 80, steps=1, width=64, height=64), Recipe.load("none")).notes
    assert len(notes) == 1 and "takes 64 tokens of its 8" in notes[0]


def test_what_overflows_float16_runs_in_bfloat16(folder: Path) -> None:
    painter = load_painter(Model(str(folder)), device=CPU, dtype=torch.float16)
    assert painter.pipe.transformer.dtype is torch.float16
    assert {painter.pipe.vae.dtype, painter.pipe.text_encoder.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "vae", "transformer"])
def test_a_folder_without_a_part_is_one_sentence(folder: Path, tmp_path: Path, part: str) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    shutil.rmtree(broken / part)
    with pytest.raises(ValueError, match=f"has no {part}: a Sana model needs it"):
        check_model(Model(str(broken)))
