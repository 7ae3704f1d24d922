"""Block-sparse attention's settings: the search, its file, and several processes that share it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted import BLOCKS, qkv, tune
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hasten.sparse import Heads, by_torch, check_limits, load_settings, save_settings, tune_heads

TESTS = Path(__file__).resolve().parent


def same(first: dict[str, Heads], second: dict[str, Heads]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(getattr(first[b], n), getattr(second[b], n))
        for b in first
        for n in ("sparse", "keep", "alike", "skip_below")
    )


def settings(heads: int = 2) -> dict[str, Heads]:
    return {
        block: Heads(
            torch.arange(heads) % 2 == 0,
            torch.where(torch.arange(heads) % 2 == 0, 0.9 - i / 10, 1.0),
            torch.where(torch.arange(heads) % 2 == 0, 0.5, 1.0),
            torch.where(torch.arange(heads) % 2 == 0, 20.0, 50.0),
        )
        for i, block in enumerate(BLOCKS)
    }


@pytest.fixture(scope="module")
def tuned() -> tuple[Heads, Tensor]:
    return tune_heads(*qkv(), attend=by_torch)


def test_the_search_finds_planted_sparsity_and_leaves_other_heads_dense(tuned: tuple[Heads, Tensor]) -> None:
    heads, skipped = tuned
    assert heads.sparse.tolist() == [True, False]
    assert skipped[0] > 0.3 and skipped[1] == 0.0
    assert (heads.keep[1], heads.alike[1]) == (1.0, 1.0)


@pytest.mark.parametrize(("l1", "pv_l1"), [(0.06, 0.065), (0.01, 0.02)])
def test_the_search_respects_its_limits(l1: float, pv_l1: float) -> None:
    q, k, v = qkv(1)
    heads, _ = tune_heads(q, k, v, l1=l1, pv_l1=pv_l1, attend=by_torch)
    out, _ = by_torch(q, k, v, heads, 0)
    exact = scaled_dot_product_attention(q, k, v)
    error = (out - exact).abs().sum((0, 2, 3)) / exact.abs().sum((0, 2, 3))
    assert bool((error < pv_l1 + 1e-6).all())


def test_dense_settings_are_dense_attention() -> None:
    q, k, v = qkv(2)
    one = torch.ones(2)
    out, skipped = by_torch(q, k, v, Heads(one < 0, one, one, one * 50), 0)
    assert not skipped.any()
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-4)


def test_the_text_is_always_on() -> None:
    from hasten.sparse import blocks_taken

    q, k, _ = qkv(3)
    one = torch.ones(2)
    taken = blocks_taken(q, k, Heads(one > 0, one * 0.01, -one, one * 50), 130)
    assert bool(taken[:, :, :2].all()) and bool(taken[:, :, :, :2].all())
    assert not bool(taken[:, :, 2:, 2:].all())


def test_files_have_the_originals_keys_and_come_back_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "tuned.safetensors"
    save_settings(settings(), file)
    names = ("is_sparse", "cdfthreshd", "simthreshd1", "simthreshd2", "pvthreshd")
    assert set(load_file(file)) == {f"{block}.spargeattn.{name}" for block in BLOCKS for name in names}
    assert same(load_settings(file, BLOCKS, heads=2), settings())


def test_a_file_of_the_original_loads(tmp_path: Path) -> None:
    file = tmp_path / "spargeattn_hyperparams_00001_.safetensors"
    values = {"is_sparse": torch.tensor([True, False]), "simthreshd2": torch.zeros(2)}
    values |= {name: torch.tensor([0.5, 1.0]).bfloat16() for name in ("cdfthreshd", "simthreshd1", "pvthreshd")}
    save_file({f"double_blocks.1.spargeattn.{name}": value for name, value in values.items()}, file)
    heads = load_settings(file, BLOCKS, heads=2)["double_blocks.1"]
    assert heads.keep.tolist() == [0.5, 1.0] and heads.keep.dtype == torch.float32


def test_a_file_that_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "tuned.safetensors"
    save_settings(settings(), file)
    for blocks, heads, words in (
        (BLOCKS[:2], 2, "10 keys do not match, such as single_blocks."),
        (("single_blocks.1",), 2, "20 keys do not match"),  # never a part of a name: 1 is not 10
        (BLOCKS, 24, "double_blocks.0 has 2 heads, 24 heads are expected"),
    ):
        with pytest.raises(ValueError, match=words):
            load_settings(file, blocks, heads)
    for content in (b"", b"no safetensors at all", file.read_bytes()[:200]):
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read"):
            load_settings(broken)
    save_file({"model.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"does not fit this model: 1 keys do not match, such as model\.weight"):
        load_settings(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_settings(tmp_path / "none.safetensors")


def test_limits_that_make_no_sense_are_one_sentence() -> None:
    for l1, pv_l1, words in ((0.06, 0.06, "pv_l1 must be above l1"), (0.0, 0.1, "between 0 and 1")):
        with pytest.raises(ValueError, match=words):
            check_limits(l1, pv_l1)


@pytest.mark.slow
def test_an_interrupted_search_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = tune(tmp_path / "whole.safetensors")
    words = whole.finish()
    assert whole.left == 0 and ("left out" in words or "dense is faster" in words)
    broken = tune(tmp_path / "broken.safetensors", stop_after=4)
    assert broken.left == 2
    resumed = tune(tmp_path / "broken.safetensors")
    assert resumed.left == 0
    resumed.finish()
    assert same(*(load_settings(tmp_path / f"{name}.safetensors") for name in ("whole", "broken")))


@pytest.mark.slow
def test_two_ranks_give_the_same_file_as_one(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent / "src")}
    command = [sys.executable, str(TESTS / "planted.py"), str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    assert [rank.wait(timeout=600) for rank in ranks] == [0, 0]
    tune(tmp_path / "one.safetensors").finish()
    assert same(*(load_settings(tmp_path / f"{name}.safetensors") for name in ("one", "two")))
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["one.safetensors", "two.safetensors"]
