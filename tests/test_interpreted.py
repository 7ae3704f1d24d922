"""Tests that need Triton's interpreter where there is no GPU: each file in a process of its own, for Triton reads
TRITON_INTERPRET once. `pytest` alone runs them all; on a GPU they run as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SAYS_SO = "Triton's interpreter is needed"
FILES = sorted(f.name for f in HERE.glob("test_*.py") if SAYS_SO in f.read_text("utf-8") and f != Path(__file__))

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_kernels_agree_with_torch_in_the_interpreter(file: str) -> None:
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
        pytest.skip("they run as they are here")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_there_are_such_files() -> None:
    assert "test_rows.py" in FILES
