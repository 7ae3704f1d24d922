"""Tuning block-sparse attention on a model, and a recipe that uses what was found."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import flux, hastened, paint

from hasten.painter import Request
from hasten.recipe import Attention, Recipe
from hasten.sparse import by_torch, load_settings
from hasten.tune_attention import LOOKS, tune_attention

NAMES = [*(f"double_blocks.{i}" for i in range(2)), *(f"single_blocks.{i}" for i in range(4))]


class Painter:
    """Paints with the tests' own FLUX, and remembers how often."""

    def __init__(self) -> None:
        self.pipe, self.text_tokens, self.pictures = flux(), 6, 0

    def paint(self, request: Request, recipe: Recipe, *, on_step: Any) -> Any:
        def stepped(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return tensors

        self.pictures += 1
        return paint(self.pipe, steps=request.steps, seed=request.seed, callback_on_step_end=stepped)


def requests(count: int = 2) -> list[Request]:
    return [Request("a red apple", width=64, height=64, steps=7, seed=i) for i in range(count)]


def test_a_file_is_made_of_exact_pictures_and_the_model_is_as_it_was(tmp_path: Path) -> None:
    painter, file, told = Painter(), tmp_path / "tuned.safetensors", []
    stock = paint(painter.pipe)
    words = tune_attention(
        painter, requests(), file, attend=by_torch, progress=lambda *given: told.append(given)  # type: ignore[arg-type]
    )  # fmt: skip
    assert list(load_settings(file, NAMES, heads=painter.pipe.transformer.config.num_attention_heads))
    assert set(load_settings(file)) == set(NAMES)
    assert words.startswith("dense is faster here")  # 22 tokens are one block
    assert told[-1][1:] == (len(NAMES) * len(LOOKS) * 2,) * 2
    assert torch.equal(paint(painter.pipe), stock)
    again = Painter()
    assert tune_attention(again, requests(), file, attend=by_torch) == words  # type: ignore[arg-type]
    assert again.pictures == 0  # all of it was found before


def test_a_recipe_names_the_file_and_what_cannot_be_used_gives_way(tmp_path: Path) -> None:
    painter, file = Painter(), tmp_path / "tuned.safetensors"
    tune_attention(painter, requests(1), file, attend=by_torch)  # type: ignore[arg-type]
    stock = paint(painter.pipe)
    latents, report = hastened(painter.pipe, {"schema": 1, "attention": {"backend": "sparse", "tuned": str(file)}})
    assert torch.equal(latents, stock)
    assert any("sparse gave way to torch's own" in note for note in report.notes)
    other = flux(double=1, single=2)
    with pytest.raises(ValueError, match="does not fit this model: 15 keys do not match, such as "):
        hastened(other, {"schema": 1, "attention": {"backend": "sparse", "tuned": str(file)}})
    with pytest.raises(ValueError, match='set it to "sparse"'):
        Attention(backend="int8", tuned=str(file))


def test_other_models_and_limits_are_refused_in_one_sentence(tmp_path: Path) -> None:
    stranger: Any = SimpleNamespace(pipe=SimpleNamespace(transformer=torch.nn.Linear(2, 2)), text_tokens=6)
    with pytest.raises(ValueError, match="Linear has no attention that can be tuned: a FLUX is expected"):
        tune_attention(stranger, requests(), tmp_path / "x.safetensors")
    painter: Any = Painter()
    with pytest.raises(ValueError, match="pv_l1 must be above l1"):
        tune_attention(painter, requests(), tmp_path / "x.safetensors", l1=0.07, pv_l1=0.06)
