"""Recordings of launches: when one is made, when it is used, when it is given up. A GPU's own are in the last test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.replay import Replay


class Tape:
    """A recorder that does the work again, on the same memory, as a GPU would."""

    def __init__(self) -> None:
        self.played = 0

    def suits(self, device: torch.device) -> bool:
        return True

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()

        def replay() -> None:
            self.played += 1
            work()

        return replay


class Broken(Tape):
    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted\nand so on")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, words: Tensor | None = None, times: int = 1) -> Tensor:
        y: Tensor = self.linear(x) * times
        return y if words is None else y + words.sum()


def replayed(recorder: Tape, layer: Layer) -> tuple[Any, Replay, list[str]]:
    said: list[str] = []
    owner = Replay(said.append, recorder)
    return owner.wrap(layer, layer), owner, said


@torch.no_grad()
def test_a_recording_gives_what_the_module_gives_for_other_numbers() -> None:
    tape, layer = Tape(), Layer()
    call, owner, _ = replayed(tape, layer)
    outs = []
    for i in range(6):
        x, words = torch.randn(2, 4), torch.randn(3)
        outs.append((call(x, words=words, times=2), layer(x, words, 2)))
        assert owner.recorded == (i >= 2)
    assert tape.played == 3
    assert all(torch.equal(ours, theirs) for ours, theirs in outs), "a result outlives the next replay"


@torch.no_grad()
def test_shapes_and_numbers_have_recordings_of_their_own_up_to_a_limit() -> None:
    tape, layer = Tape(), Layer()
    call, owner, _ = replayed(tape, layer)
    for rows in (1, 2, 3):
        for _ in range(3):
            call(torch.randn(rows, 4))
    for _ in range(3):
        call(torch.randn(1, 4), times=3)
    assert owner.recorded == 4
    for _ in range(5):
        x = torch.randn(9, 4)
        assert torch.equal(call(x), layer(x))
    assert owner.recorded == 4


@torch.no_grad()
def test_weights_that_lie_elsewhere_and_parts_that_were_replaced_are_noticed() -> None:
    tape, layer = Tape(), Layer()
    call, owner, _ = replayed(tape, layer)
    x = torch.randn(2, 4)
    for change in (lambda: None, lambda: layer.linear.weight.data.mul_(2)):
        change()
        for _ in range(4):
            assert torch.equal(call(x), layer(x))
    assert owner.recorded == 1
    for change in (
        lambda: setattr(layer.linear.weight, "data", layer.linear.weight.data.clone() * 3),
        lambda: setattr(layer, "linear", nn.Sequential(layer.linear)),
    ):
        change()
        played = tape.played
        assert torch.equal(call(x), layer(x)) and tape.played == played


@torch.no_grad()
def test_a_machine_that_cannot_record_says_so_once_and_computes() -> None:
    layer = Layer()
    call, _, said = replayed(Broken(), layer)
    x = torch.randn(2, 4)
    for _ in range(5):
        assert torch.equal(call(x), layer(x))
    assert said == ["launches cannot be recorded here, blocks run unrecorded (operation not permitted)"]


def test_gradients_and_foreign_arguments_are_left_alone() -> None:
    tape, layer = Tape(), Layer()
    call, owner, _ = replayed(tape, layer)
    for _ in range(4):
        call(torch.randn(1, 4))
    assert owner.recorded == 0
    with torch.no_grad():
        for _ in range(4):
            owner.works([torch.randn(1), {}])
        assert not owner.works([torch.randn(1), {}]) and not owner.works([1])


@pytest.mark.gpu
@torch.no_grad()
def test_a_gpu_replays_bit_for_bit() -> None:
    layer, said = Layer().cuda(), []
    owner = Replay(said.append)
    call = owner.wrap(layer, layer)
    for _ in range(5):
        x, words = torch.randn(2, 4, device="cuda"), torch.randn(3, device="cuda")
        assert torch.equal(call(x, words), layer(x, words))
    assert owner.recorded == 1 and said == []
