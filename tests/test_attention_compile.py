"""The 8-bit attention compiles for a Hopper GPU by the Triton that is here: Gluon changes its names with each."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from compiled import compile_for_hopper

from hasten.kernels import attention8, chosen, eight

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter stands in for the compiler", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]


class Kept:
    """A kernel that keeps how it was launched and does nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launched = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launched.append((args, options))

    def compiled(self, *, gluon: bool = False) -> list[Any]:
        return [compile_for_hopper(self.kernel, *launch, gluon=gluon) for launch in self.launched]


def kept(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> Kept:
    found = Kept(getattr(module, name))
    monkeypatch.setattr(module, name, found)
    return found


@pytest.mark.parametrize(("rows", "dim"), [(4608, 128), (4700, 64)])
def test_the_hopper_kernel_compiles(rows: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.kernels import attention8_hopper, chosen_triton, eight_triton

    first, prepare = (kept(eight_triton, name, monkeypatch) for name in ("first", "prepare"))
    choose = kept(chosen_triton, "choose", monkeypatch)
    attend, join = (kept(attention8_hopper, name, monkeypatch) for name in ("attend", "join_cut"))
    monkeypatch.setattr(attention8, "_multiprocessors", lambda device: 132)
    q = torch.zeros(1, 24, rows, dim, dtype=torch.bfloat16)
    prepared = eight.prepare(q, q, q, means=True, alike=False)
    dense = eight.prepare(q, q, q)
    blocks = chosen.choose(prepared, keep=torch.ones(24), alike=None)
    attention8.attend_hopper(dense, q.dtype)
    attention8.attend_hopper(prepared, q.dtype, chosen=blocks)
    assert len(first.launched) == len(prepare.launched) == len(attend.launched) == 2
    assert choose.launched and join.launched
    assert all(first.compiled()) and all(prepare.compiled()) and all(choose.compiled()) and all(join.compiled())
    for program in attend.compiled(gluon=True):
        assert program.metadata.shared <= 227 * 1024
