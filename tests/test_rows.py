"""Fused passes and their matrix products: by torch against float32, by Triton (its interpreter on a CPU) against torch.

Triton's interpreter cuts bfloat16 and float8 off instead of rounding, so a number may be off by one step of its dtype
there: 2**-7 and 2**-3 of its size; on a GPU by half of that.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.kernels import linear, rows

pytest.importorskip("triton")
if not torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("without a GPU Triton's interpreter is needed: TRITON_INTERPRET=1", allow_module_level=True)

FP8 = torch.float8_e4m3fn
STEPS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, FP8: 2.0**-3}
SHAPES = [(1, 0, 5, 48), (2, 3, 5, 48), (1, 7, 1, 33), (3, 1, 9, 128)]  # batch, text tokens, image tokens, width
DTYPES = [torch.float32, torch.bfloat16, FP8, torch.int8]


def noise(*shape: int, seed: int = 0, size: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype).to(device)


def said(found: tuple[Tensor, Tensor]) -> Tensor:
    """What rows and their scales stand for."""
    values, scales = found
    return values.float() * scales if scales.numel() else values.float()


def agree(
    found: Tensor, wanted: Tensor, dtype: torch.dtype, scales: Tensor | None = None, more: Tensor | float = 0.0
) -> None:
    """Within one step of the dtype, and `more`; an int8's step is its row's scale."""
    if dtype == torch.int8:
        assert scales is not None
        slack: Any = scales * 1.01
    else:
        smallest = 2.0**-9 * scales if dtype == FP8 and scales is not None else 1e-6
        slack = STEPS[dtype] * wanted.float().abs() * 1.01 + smallest
    slack = slack + more
    off = (found.float() - wanted.float()).abs()
    fine = off <= slack
    if dtype == FP8 and not found.is_cuda:
        # Where rounding to a float8 reaches the next power of two, the interpreter loses the carry.
        fine |= (2 * found.float() - wanted.float()).abs() <= slack
    assert bool(fine.all()), float((off - slack).max())


def streams(batch: int, length: int, tokens: int, width: int, size: float = 1.0) -> dict[str, Tensor]:
    return {
        "text": noise(batch, length, width, size=size),
        "image": noise(batch, tokens, width, seed=1, size=size),
        "update": noise(batch * (length + tokens), width, seed=2, size=size),
        "text_mods": noise(batch, 6 * width, seed=3),
        "image_mods": noise(batch, 6 * width, seed=4),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_norm_and_modulation_agree_with_torch(
    shape: tuple[int, int, int, int], dtype: torch.dtype, joint: bool, size: float
) -> None:
    s = streams(*shape, size=size)
    given = (s["text"], s["image"], s["text_mods"], s["image_mods"], 3, 4, joint, 1e-6, dtype)
    found, wanted = rows.norm_modulate_by_triton(*given), rows.norm_modulate_by_torch(*given)
    assert found[0].dtype == dtype and found[0].shape == wanted[0].shape
    agree(said(found), said(wanted), dtype, wanted[1] if wanted[1].numel() else None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_the_gated_residual_is_kept_and_normed(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    s = streams(*shape)
    given = (s["text"], s["image"], s["update"], s["text_mods"], s["image_mods"], 2, 3, 4, 1e-6, dtype)
    text, image, *found = rows.add_norm_modulate_by_triton(*given)
    text_wanted, image_wanted, *_ = rows.add_norm_modulate_by_torch(*given)
    agree(text, text_wanted, torch.bfloat16)
    agree(image, image_wanted, torch.bfloat16)
    # The norm is of what was kept: of the rounded sum.
    after = (text, image, s["text_mods"], s["image_mods"], 3, 4, False, 1e-6, dtype)
    wanted = rows.norm_modulate_by_torch(*after)
    agree(said((found[0], found[1])), said(wanted), dtype, wanted[1] if wanted[1].numel() else None)
    for joint in (True, False):
        given_too = (s["text"], s["image"], s["update"], s["text_mods"], s["image_mods"], 2, joint)
        for a, b in zip(rows.add_gated_by_triton(*given_too), rows.add_gated_by_torch(*given_too), strict=True):
            agree(a, b, torch.bfloat16)


@pytest.mark.parametrize(("count", "width", "before"), [(1, 33, None), (5, 100, 48), (3, 256, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_gelu_beside_something_agrees_with_torch(
    count: int, width: int, before: int | None, dtype: torch.dtype, size: float
) -> None:
    hidden = noise(count, width + 8, size=size)[:, 8:]  # rows that lie apart
    head = None if before is None else noise(count, before, seed=1, size=size)
    found, wanted = rows.gelu_beside_by_triton(head, hidden, dtype), rows.gelu_beside_by_torch(head, hidden, dtype)
    more: Tensor | float = 0.0
    if hidden.is_cuda and wanted[1].numel():  # its own tanh is within 2^-11
        more = torch.nn.functional.pad(hidden.float().abs() / 4096, (0 if head is None else head.shape[1], 0))
    agree(said(found), said(wanted), dtype, wanted[1] if wanted[1].numel() else None, more)


@pytest.mark.parametrize("parts", [1, 3, 4])
@pytest.mark.parametrize("programs", [1, 2, 5])
def test_gelu_in_parts_and_in_turns_is_the_same(parts: int, programs: int) -> None:
    hidden, head = noise(5, 100), noise(5, 48, seed=1)
    wanted = rows.gelu_beside_by_triton(head, hidden, FP8)
    found = rows.gelu_beside_by_triton(head, hidden, FP8, parts=parts, programs=programs, stages=2)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_is_split_into_its_streams(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    batch, length, tokens, width = shape
    joint = noise(batch, length + tokens, width)
    found, wanted = (
        rows.split_streams_by_triton(joint, length, dtype),
        rows.split_streams_by_torch(joint, length, dtype),
    )
    agree(said(found), said(wanted), dtype, wanted[1] if wanted[1].numel() else None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("heads", [1, 3])
def test_norm_and_rotation_agree_with_torch(shape: tuple[int, int, int, int], joint: bool, heads: int) -> None:
    batch, length, tokens, _ = shape
    width, total = 16, length + tokens
    qkv = noise(batch * total, 3 * heads * width + 5)
    norms = tuple(noise(width, seed=i) for i in range(4))
    angles = noise(total, width, seed=9, dtype=torch.float32)
    given = angles.cos()[:, ::2], angles.sin()[:, ::2], batch, length, heads, joint, 1e-6
    found = rows.norm_rope_by_triton(qkv, norms, *given)
    wanted = rows.norm_rope_by_torch(qkv, *norms, *given)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == (batch, total, heads, width)
        # A rotated number is a difference of two: its error is a step of the larger.
        assert bool(((a.float() - b.float()).abs() <= 2.0**-7 * b.float().abs().amax(-1, keepdim=True) * 2).all())
    values = rows.values_of(qkv, heads, width, batch, length, joint)
    text, image = rows.streams_of(qkv, heads * width, batch, length, joint)
    assert torch.equal(values, torch.cat([text, image], 1)[..., 2 * heads * width :].unflatten(-1, (heads, width)))
    assert values.data_ptr() == qkv[:, 2 * heads * width :].data_ptr() or (batch > 1 and not joint)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8, torch.int8])
def test_a_broken_number_breaks_its_row_and_no_other(bad: float, dtype: torch.dtype) -> None:
    joint = noise(1, 3, 48)
    joint[0, 1, 7] = bad
    for split in (rows.split_streams_by_triton, rows.split_streams_by_torch):
        if bad != bad and dtype == FP8 and split is rows.split_streams_by_triton and not joint.is_cuda:
            continue  # the interpreter's float8 has no NaN
        meant = said(split(joint, 1, dtype))
        assert bool(meant[[0, 2]].isfinite().all())
        assert not bool(meant[1].isfinite().all())


@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_a_row_of_zeros_stays_zero(dtype: torch.dtype) -> None:
    joint = torch.zeros_like(noise(1, 2, 48))
    for split in (rows.split_streams_by_triton, rows.split_streams_by_torch):
        assert not said(split(joint, 1, dtype)).any()


@pytest.mark.parametrize("dtype", [None, FP8, torch.int8])
@pytest.mark.parametrize("split", [0, 3])
def test_layers_laid_together_or_apart_say_the_same(dtype: torch.dtype | None, split: int) -> None:
    given = noise(20, 32, dtype=torch.float32)
    layers = [(noise(16, 32, seed=i, dtype=torch.float32), noise(16, seed=i, dtype=torch.float32)) for i in range(6)]
    wanted = torch.cat([given @ w.t() + b for w, b in layers[3:]], -1)
    wanted[:split] = torch.cat([given[:split] @ w.t() + b for w, b in layers[:3]], -1)
    if dtype is None:
        text, image = layers[:3] if split else [], layers[3:]
        found = [linear.linear_rows(given, split, text, image)]
        laid = [
            list(zip(*(linear.lay_together(t) for t in zip(*ls, strict=True)), strict=True)) if ls else []
            for ls in (text, image)
        ]
        found.append(linear.linear_rows(given, split, *laid))
        slack = 1e-5
    else:
        eight = [(*rows.quantise(w, dtype), b) for w, b in layers]
        eight = [(w, s.flatten(), b) for w, s, b in eight]
        text, image = eight[:3] if split else [], eight[3:]
        values, scales = rows.quantise(given, dtype)
        found = [linear.linear_rows_8(values, scales, split, text, image, torch.float32)]
        laid = [
            list(zip(*(linear.lay_together(t) for t in zip(*ls, strict=True)), strict=True)) if ls else []
            for ls in (text, image)
        ]
        found.append(linear.linear_rows_8(values, scales, split, *laid, torch.float32))
        # Relative L2 error of 8-bit rows times 8-bit weights: 3 bits of fraction, or 7 bits of the largest.
        slack = {FP8: 0.05, torch.int8: 0.02}[dtype]
    assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert float((found[0] - wanted).norm() / wanted.norm()) <= slack


def test_layers_lie_together_only_when_they_do() -> None:
    apart = [noise(4, 8), noise(2, 8)]
    assert linear.together(apart) is None
    laid = linear.lay_together(apart)
    whole = linear.together(laid)
    assert whole is not None and torch.equal(whole, torch.cat(apart))
    assert whole.data_ptr() == laid[0].data_ptr()
    assert linear.together(laid[::-1]) is None


def test_gelu_as_a_last_step_and_two_parts_are_what_they_say() -> None:
    x, hidden = noise(5, 32, dtype=torch.float32), noise(5, 64, seed=1, dtype=torch.float32)
    weight, bias = noise(16, 96, seed=2, dtype=torch.float32), noise(16, seed=3, dtype=torch.float32)
    wanted = torch.cat([x, hidden], -1) @ weight.t() + bias
    assert torch.allclose(linear.linear_beside(x, hidden, weight, bias), wanted, atol=1e-4)
    wanted = torch.nn.functional.gelu(x @ weight[:, :32].t() + bias, approximate="tanh")
    assert torch.allclose(linear.linear_rows(x, 0, [], [(weight[:, :32], bias)], gelu=True), wanted, atol=1e-4)


@pytest.mark.parametrize("joint", [True, False])
def test_the_compiler_sees_through(joint: bool) -> None:
    s = streams(1, 3, 5, 48)

    def work(text: Tensor, image: Tensor) -> Tensor:
        values, scales = rows.norm_modulate(
            text, image, s["text_mods"], s["image_mods"], shift=0, scale=1, joint=joint, dtype=FP8
        )
        return values.float() * scales

    compiled = torch.compile(work, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(s["text"], s["image"]), work(s["text"], s["image"]))
