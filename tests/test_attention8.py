"""The 8-bit kernels: interpreted on a CPU against float32 and exact emulations, and on a GPU as they are compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hasten.kernels.attention8 import _cuts

ROOT = Path(__file__).resolve().parents[1]
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")

LAWS = (
    "int8_scores_are_their_exact_emulation",
    "a_constant_on_every_key_changes_nothing",
    "any_length_and_head_size_comes_near_float32",
    "scores_and_sums_beyond_float16_stay_finite",
    "rows_and_values_may_be_of_any_size_from_block_to_block",
    "one_key_may_outweigh_all_blocks_behind_it",
    "scores_that_are_not_lifted_weigh_something",
    "strides_are_read_in_place",
    "norm_rotation_and_two_streams_are_taken_on_the_way",
    "rows_of_a_product_are_read_as_they_lie",
    "keeping_every_block_is_dense",
    "chosen_blocks_are_sdpa_with_the_expanded_mask",
    "rows_that_are_no_numbers_attend_to_every_block",
    "the_order_of_the_rows_changes_blocks_alone",
    "a_mean_that_speaks_for_any_block_needs_no_likeness",
    "text_is_always_on_and_blocks_unlike_themselves_too",
    "the_weight_to_keep_is_kept_to",
    "skipping_what_weighs_nothing_changes_nothing",
)


@TRITON
@pytest.mark.slow  # torch is imported anew: Triton reads TRITON_INTERPRET once
def test_the_laws_hold_where_kernels_are_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    script = f"import attention8_laws as laws\nfor name in {LAWS}: getattr(laws, name)('cpu')"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@TRITON
@pytest.mark.gpu
@pytest.mark.parametrize("law", LAWS)
def test_the_laws_hold_where_kernels_are_compiled(law: str) -> None:
    import attention8_laws

    getattr(attention8_laws, law)("cuda")


def test_a_last_round_is_cut_where_that_makes_it_shorter() -> None:
    for rest in range(132):
        cuts = _cuts(rest, 132, 36)
        assert -(-rest * cuts // 132) / cuts + 0.04 * cuts <= -(-rest // 132) + 0.04
        assert cuts == 1 or rest * cuts <= 8 * 132
    assert _cuts(0, 132, 36) == _cuts(131, 132, 36) == _cuts(10, 132, 1) == 1
    assert _cuts(48, 132, 36) == 2


@TRITON
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4608, 4700, 16896])
def test_long_sums_of_values_that_do_not_cancel_lose_nothing(rows: int) -> None:
    import attention8_laws as laws

    q, k, v = laws.qkv("cuda", rows, 128)
    v = v + 1.0
    exact = laws.exactly(q, k, v).float()
    found = laws.attention8(q, k, v).float()
    assert laws.error(found, exact) < laws.near_enough("cuda", True)
    # Tensor cores cut sums of e4m3 products off: what is carried on for too long comes out too small.
    assert abs(float((found * exact).sum() / exact.square().sum()) - 1.0) < 0.003
