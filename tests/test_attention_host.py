"""A recipe's attention in a diffusers FLUX: the same picture, per instance, exact where asked, gone when removed."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_sana as sana
import torch
from runs import flux, hastened, paint
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import hasten
from hasten.attention_backends import BACKENDS, Backend
from hasten.hosts.diffusers_attention import HungAttention
from hasten.recipe import Attention


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


SANA = {
    "cfg": {},
    "no mask to speak of": sana.words(10, negative=False) | {"guidance_scale": 1.0},
    "two lengths": sana.words(3, 9),
}


@pytest.mark.parametrize("given", SANA)
@pytest.mark.parametrize("stack", [{}, {"compile": {"blocks": True, "backend": "eager"}}])
def test_sanas_words_are_attended_to_by_what_is_asked_for(given: str, stack: dict[str, Any], rough: list[int]) -> None:
    """Left out is as good as masked, up to rounding; each sample has its own words, and a later call its own mask."""
    pipe = sana.sana()
    stock = [sana.paint(pipe, steps=3, **SANA[given]), sana.paint(pipe, steps=3)]
    with hasten.accelerate(pipe, settings("sdpa") | stack) as run:
        found = [sana.paint(pipe, steps=3, **SANA[given]), sana.paint(pipe, steps=3)]
        assert run.report is not None and "attention sdpa" in run.report.line() and run.report.notes[1:] == []
    assert all(float((one - other).norm() / other.norm()) < 1e-5 for one, other in zip(found, stock, strict=True))
    latents, report = hastened_sana(pipe, settings("int8") | stack, **SANA[given])
    assert rough and "attention int8" in report.line()
    assert 0 < float((latents - stock[0]).norm() / stock[0].norm()) < 0.05
    assert torch.equal(sana.paint(pipe, steps=3), stock[1])


def hastened_sana(pipe: Any, recipe: dict[str, Any], **given: Any) -> tuple[Tensor, Any]:
    with hasten.accelerate(pipe, recipe) as run:
        return sana.paint(pipe, steps=3, **given), run.report


def test_a_masked_word_between_others_is_left_out_too() -> None:
    pipe, given = sana.sana(), sana.words(9)
    given["prompt_attention_mask"][0, 4] = 0
    stock = sana.paint(pipe, steps=3, **given)
    latents, _ = hastened_sana(pipe, settings("sdpa"), **given)
    assert float((latents - stock).norm() / stock.norm()) < 1e-5
    given["prompt_attention_mask"][0, 4] = 1
    assert float((sana.paint(pipe, steps=3, **given) - stock).norm() / stock.norm()) > 1e-4


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_is_written_in_place_is_looked_at_again(inference: bool) -> None:
    blocks = list(sana.sana().transformer.transformer_blocks)
    hung = HungAttention(blocks, Attention(backend="sdpa"))
    with torch.inference_mode(inference):
        mask = torch.tensor([[1, 1, 1, 0]])
        hung.leave_out(mask)
        assert hung.attention.kept == (3,)
        mask[0, 2] = 0
        hung.leave_out(mask)
        assert hung.attention.kept == (2,)


def test_a_bare_call_heeds_its_own_mask() -> None:
    """Outside of a run too: what the last call's mask left out is not this one's."""
    pipe, given = sana.sana(), sana.words(3, negative=False)
    call = {
        "hidden_states": sana.noise(1, 32, 4, 4, seed=1),
        "encoder_hidden_states": given["prompt_embeds"],
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }
    masks = [given["prompt_attention_mask"], torch.ones(1, 10), None]
    with torch.no_grad():
        stock = [pipe.transformer(encoder_attention_mask=mask, **call)[0] for mask in masks]
        handle = hasten.apply(pipe.transformer, settings("sdpa"))
        for mask, wanted in zip(masks, stock, strict=True):
            out = pipe.transformer(encoder_attention_mask=mask, **call)[0]
            assert float((out - wanted).norm() / wanted.norm()) < 1e-5
        handle.remove()
