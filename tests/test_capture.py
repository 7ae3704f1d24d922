"""Recordings are made where torch's own allocator is, and elsewhere nothing is recorded, with a sentence."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from hasten.capture import Recorded, obstacle, without_collector

TESTS = Path(__file__).resolve().parent

# What ComfyUI sets before torch is loaded: in a process of its own.
UNDER_ANOTHER_ALLOCATOR = """
import torch
from runs import call, model_inputs, transformer
from test_replay import Model, inputs
from test_token_laws import INSIDE
import hasten
from hasten.replay import Replays

torch.set_grad_enabled(False)
assert torch.cuda.get_allocator_backend() == "cudaMallocAsync"
model = transformer().to("cuda")
given = {k: v.to("cuda") if isinstance(v, torch.Tensor) else v for k, v in model_inputs().items()}
sigmas = [1.0 - i / 14 for i in range(15)]
for name, settings in INSIDE.items():
    outputs = []
    for record in (True, False):
        handle = hasten.apply(model, {**settings, "tokens": {**settings["tokens"], "record": record}})
        with handle.run(sigmas):
            outputs.append([call(model, given, sigma).clone() for sigma in sigmas[:-1]])
        notes = [note for note in handle.report.notes if "--disable-cuda-malloc" in note]
        assert len(notes) == (record and settings["tokens"].get("memory") != "host"), (name, record, notes)
        handle.remove()
    assert all(map(torch.equal, *outputs)), name
said = []
ours, stock = Model(Replays(say=said.append), device="cuda"), Model(None, device="cuda")
for seed in range(4):
    assert torch.equal(ours(*inputs(seed, device="cuda")), stock(*inputs(seed, device="cuda")))
assert len(said) == 1 and "--disable-cuda-malloc" in said[0] and ours.calls == stock.calls
"""


def test_another_allocator_is_an_obstacle_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    assert obstacle() is None
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert "this is cudaMallocAsync (in ComfyUI: start it with --disable-cuda-malloc)" in str(obstacle())


def test_the_collector_stays_away_while_launches_are_taken_down() -> None:
    for before in (True, False):
        (gc.enable if before else gc.disable)()
        try:
            with pytest.raises(RuntimeError), without_collector():
                assert not gc.isenabled()
                raise RuntimeError("the capture fails")
            assert gc.isenabled() == before
        finally:
            gc.enable()


def test_the_collector_comes_back_when_the_last_thread_is_done() -> None:
    entered, may_leave = threading.Event(), threading.Event()

    def take_down() -> None:
        with without_collector():
            entered.set()
            may_leave.wait()

    other = threading.Thread(target=take_down)
    assert gc.isenabled()
    with without_collector():
        other.start()
        assert entered.wait(60)
    seen = gc.isenabled()
    may_leave.set()
    other.join()
    assert not seen and gc.isenabled()


@pytest.mark.gpu
def test_under_another_allocator_nothing_is_recorded_and_that_is_said_once() -> None:
    path = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", UNDER_ANOTHER_ALLOCATOR],
        env={**os.environ, "PYTHONPATH": path, "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "captured allocation" not in done.stderr


@pytest.mark.gpu
def test_a_capture_that_fails_spoils_no_later_one() -> None:
    if obstacle() is not None:
        pytest.skip(obstacle())
    x = torch.ones(8, 8, device="cuda")

    def waits(given: list[torch.Tensor]) -> list[torch.Tensor]:
        return [given[0] * float((given[0] @ given[0]).sum())]

    with pytest.raises(RuntimeError):
        Recorded(waits, [x], [], None)
    recorded = Recorded(lambda given: [given[0] @ given[0]], [x], [], None)
    for factor in (1.0, 2.0):
        (out,) = recorded.play([x * factor])
        assert torch.equal(out, (x * factor) @ (x * factor))
