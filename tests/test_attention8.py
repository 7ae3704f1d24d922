"""The 8-bit kernels: interpreted on a CPU against float32 and exact emulations, and on a GPU as they are compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")

LAWS = (
    "int8_scores_are_their_exact_emulation",
    "a_constant_on_every_key_changes_nothing",
    "any_length_and_head_size_comes_near_float32",
    "strides_are_read_in_place",
    "norm_rotation_and_two_streams_are_taken_on_the_way",
    "rows_of_a_product_are_read_as_they_lie",
    "keeping_every_block_is_dense",
    "chosen_blocks_are_sdpa_with_the_expanded_mask",
    "the_order_of_the_rows_changes_blocks_alone",
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
