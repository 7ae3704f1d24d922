"""The curve along which an image's tokens are read: every place once, neighbours one after the other."""

from __future__ import annotations

import pytest
import torch

from hasten.kernels.curve import hilbert, token_order


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (64, 64), (5, 7), (1, 3), (48, 80), (1, 1)])
def test_every_place_comes_once(rows: int, columns: int) -> None:
    assert torch.equal(hilbert(rows, columns).sort().values, torch.arange(rows * columns))


def test_each_place_of_a_square_lies_beside_the_one_before_it() -> None:
    y, x = hilbert(64, 64) // 64, hilbert(64, 64) % 64
    assert bool(((y.diff().abs() + x.diff().abs()) == 1).all())


def test_a_block_of_128_is_a_patch() -> None:
    y, x = (hilbert(64, 64) // 64).view(-1, 128), (hilbert(64, 64) % 64).view(-1, 128)
    sides = torch.stack([t.amax(1) - t.amin(1) + 1 for t in (y, x)])
    assert sides.amax() <= 16 and sides.prod(0).amax() == 128


def test_text_stays_where_it_is() -> None:
    order = token_order(3, 2, 2, torch.device("cpu"))
    assert order.dtype == torch.int32 and order[:3].tolist() == [0, 1, 2]
    assert order[3:].sort().values.tolist() == [3, 4, 5, 6]
