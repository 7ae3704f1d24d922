"""Attention from before norm and rotation on: the same as norm, rotation and attention one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runs import flux, hastened, paint
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hasten.attention import Attention
from hasten.attention_backends import BACKENDS, FP8, Backend
from hasten.attention_streams import attend_rows, attend_streams
from hasten.kernels import rows
from hasten.kernels.streams import Streams


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`int8_fp8` on a CPU: torch's own behind the joined streams, and how many tokens each call had."""
    calls: list[int] = []

    def attend(streams: Streams, dtype: torch.dtype) -> Tensor:
        calls.append(streams.rows)
        return scaled_dot_product_attention(*streams.joined()).to(dtype).transpose(1, 2)

    own = Backend("int8_fp8", "of the test", FP8, lambda ask: None, scaled_dot_product_attention, attend)
    monkeypatch.setitem(BACKENDS, "int8_fp8", own)
    return calls


def qkv(batch: int, rows_: int) -> Tensor:
    return torch.randn(batch * rows_, 3 * 2 * 64, generator=torch.Generator().manual_seed(rows_))


@pytest.mark.parametrize("wanted", ["int8_fp8", "sdpa"])
@pytest.mark.parametrize("joint", [True, False])
def test_rows_as_they_lie_give_what_norm_rope_and_attention_give(fused: list[int], wanted: str, joint: bool) -> None:
    attention = Attention(wanted)
    norms = tuple(torch.rand(64, generator=torch.Generator().manual_seed(i)) + 0.5 for i in range(4))
    turn = torch.randn(50, 32, generator=torch.Generator().manual_seed(5))
    given: dict[str, Any] = {"batch": 2, "length": 20, "heads": 2, "joint": joint}
    found = attend_rows(attention, qkv(2, 50), norms, (turn.cos(), turn.sin()), **given)
    q, k, v = rows.norm_rope(qkv(2, 50), norms, (turn.cos(), turn.sin()), **given)
    exact = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)
    assert fused == ([50] if wanted == "int8_fp8" else [])
    assert attention.used == {wanted: 1}


def test_one_stream_needs_no_text(fused: list[int]) -> None:
    attention = Attention("int8_fp8")
    image = tuple(torch.randn(1, 30, 2, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    gains = torch.ones(64)
    turn = torch.randn(30, 32, generator=torch.Generator().manual_seed(5))
    halves = attend_streams(attention, image, None, (gains, gains, None, None), 1e-6, (turn.cos(), turn.sin()))
    twice = [t.repeat_interleave(2, 1) for t in (turn.cos(), turn.sin())]
    wholes = attend_streams(attention, image, None, (gains, gains, None, None), 1e-6, (twice[0], twice[1]))
    assert torch.equal(halves, wholes) and halves.shape == (1, 30, 2, 64) and fused == [30, 30]


def test_a_picture_is_the_same_to_the_bit_where_only_the_place_of_norm_and_rope_changes(fused: list[int]) -> None:
    pipe = flux()
    stock = paint(pipe)
    latents, report = hastened(pipe, {"schema": 1, "attention": {"backend": "int8_fp8"}})
    assert torch.equal(latents, stock)
    assert "attention int8_fp8" in report.notes and len(fused) == 8 * 6


def test_what_fails_there_gives_way_and_the_picture_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(streams: Streams, dtype: torch.dtype) -> Tensor:
        raise RuntimeError("out of registers")

    own = Backend("int8_fp8", "of the test", FP8, lambda ask: None, scaled_dot_product_attention, fails)
    monkeypatch.setitem(BACKENDS, "int8_fp8", own)
    pipe = flux()
    stock = paint(pipe)
    latents, report = hastened(pipe, {"schema": 1, "attention": {"backend": "int8_fp8"}})
    assert torch.equal(latents, stock)
    assert any(note.endswith("gave way to torch's own: out of registers") for note in report.notes)


def test_both_are_one_step_of_a_graph(fused: list[int]) -> None:
    attention = Attention("int8_fp8")
    norms = tuple(torch.ones(64) for _ in range(4))
    turn = torch.randn(50, 32, generator=torch.Generator().manual_seed(5))
    rope = turn.cos(), turn.sin()

    def of_rows(qkv: Tensor) -> Tensor:
        return attend_rows(attention, qkv, norms, rope, batch=2, length=20, heads=2, joint=False)

    def of_streams(image: Tensor, text: Tensor) -> Tensor:
        return attend_streams(attention, (image,) * 3, (text,) * 3, norms, 1e-6, rope)

    noise = torch.Generator().manual_seed(1)
    image, text = torch.randn(2, 30, 2, 64, generator=noise), torch.randn(2, 20, 2, 64, generator=noise)
    for function, given in ((of_rows, (qkv(2, 50),)), (of_streams, (image, text))):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert torch.equal(compiled(*given), function(*given))
