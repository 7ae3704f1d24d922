"""The Sana that ships: a plain diffusers folder of a bearable size, the laws on it, and what its recipes are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.recipe import recipe_names

FOLDER = Path(__file__).resolve().parents[1] / "models" / "sana-nano"


@pytest.fixture(scope="module")
def pipe() -> Any:
    from diffusers import SanaPipeline

    loaded = SanaPipeline.from_pretrained(FOLDER)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe: Any, steps: int, *, kind: str = "latent", **more: Any) -> Tensor:
    images: Tensor = pipe(
        "a red apple on a blue table", height=256, width=256, num_inference_steps=steps, guidance_scale=4.5,
        use_resolution_binning=False, complex_human_instruction=None, max_sequence_length=64, output_type=kind,
        generator=torch.Generator().manual_seed(1), **more,
    ).images  # fmt: skip
    return images


def test_it_is_small() -> None:
    sizes = [file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(sizes) <= 32 * 2**20 and max(sizes) <= 15 * 2**20


def test_the_laws_hold(pipe: Any) -> None:
    """Never reusing is stock's bits; a cancelled run leaves nothing behind; nor does a recipe that was left."""
    stock = draw(pipe, 3)
    with hasten.accelerate(pipe, {"schema": 1, "cache": {"method": "interval", "every": 1}}):
        assert torch.equal(draw(pipe, 3), stock)

    def stop(*given: Any) -> dict[str, Any]:
        raise InterruptedError

    with hasten.accelerate(pipe, {"schema": 1, "cache": {"method": "interval", "every": 4}}) as run:
        first = draw(pipe, 3)
        with pytest.raises(InterruptedError):
            draw(pipe, 5, callback_on_step_end=stop)
        assert torch.equal(draw(pipe, 3), first)
    assert [report.strip for report in run.reports] == ["C.C", "C", "C.C"]
    assert torch.equal(draw(pipe, 3), stock)


@pytest.mark.slow
def test_recipes_are_far_nearer_than_as_many_plain_steps(pipe: Any) -> None:
    uncached = draw(pipe, 20, kind="pt")

    def psnr(picture: Tensor) -> float:
        return float(-10 * (picture - uncached).square().mean().log10())

    assert uncached.std() > 0.05, "a picture, not a plain one"
    for name in recipe_names():
        with hasten.accelerate(pipe, name) as run:
            ours = psnr(draw(pipe, 20, kind="pt"))
        assert run.report.computed < 20
        assert ours > psnr(draw(pipe, run.report.computed, kind="pt")) + 3, name
