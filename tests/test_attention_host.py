"""A recipe's attention in a diffusers FLUX: the same picture, per instance, exact where asked, gone when removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runs import flux, hastened, paint
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hasten.attention_backends import BACKENDS, Backend


def settings(backend: str, **attention: Any) -> dict[str, Any]:
    return {"schema": 1, "attention": {"backend": backend, **attention}}


@pytest.fixture
def rough(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A back-end `int8` for the CPU that is off by one in a hundred, and the calls that it took."""
    calls: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape[2])
        return scaled_dot_product_attention(q, k, v) * 1.01

    monkeypatch.setitem(BACKENDS, "int8", Backend("int8", "of the test", 0.03, lambda ask: None, attend))
    return calls


def test_torchs_own_through_the_registry_is_bit_identical() -> None:
    pipe = flux()
    stock = paint(pipe)
    latents, report = hastened(pipe, settings("sdpa"))
    assert torch.equal(latents, stock)
    assert "attention sdpa" in report.line()


def test_what_cannot_be_used_costs_nothing_and_says_so() -> None:
    pipe = flux()
    stock = paint(pipe)
    latents, report = hastened(pipe, settings("int8_fp8"))
    assert torch.equal(latents, stock)
    assert any(note.startswith("attention int8_fp8 gave way to torch's own: ") for note in report.notes)


def test_it_is_undone_and_belongs_to_one_pipeline(rough: list[int]) -> None:
    pipe, other = flux(), flux()
    processors = [block.attn.processor for block in pipe.transformer.transformer_blocks]
    stock = paint(pipe)
    latents, report = hastened(pipe, settings("int8"))
    assert not torch.equal(latents, stock) and rough
    assert "attention int8" in report.notes
    assert [block.attn.processor for block in pipe.transformer.transformer_blocks] == processors
    rough.clear()
    assert torch.equal(paint(pipe), stock) and torch.equal(paint(other), stock)
    assert not rough


@pytest.mark.parametrize(
    ("exact", "share"),
    [
        ({"exact_first": 3}, 5 / 8),
        ({"exact_last": 2}, 6 / 8),
        ({"exact_blocks": [0, 1, 5]}, 0.5),
        ({"exact_first": 9}, 0),
    ],
)
def test_steps_and_blocks_that_are_named_stay_exact(rough: list[int], exact: dict[str, Any], share: float) -> None:
    pipe = flux()
    stock = paint(pipe)
    hastened(pipe, settings("int8"))
    rough.clear()
    latents, _ = hastened(pipe, settings("int8", **exact))
    assert len(rough) == round(share * 8 * 6)
    assert torch.equal(latents, stock) == (share == 0)


def test_it_composes_with_a_cache(rough: list[int]) -> None:
    report = hastened(flux(), {**settings("int8"), "cache": {"method": "interval", "every": 2}})[1]
    assert report.reused and "attention int8" in report.notes


def test_a_block_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^attention\.exact_blocks names block 6: the model has 6 blocks"):
        hastened(flux(), settings("int8", exact_blocks=[6]))
