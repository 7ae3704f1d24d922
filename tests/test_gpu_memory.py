"""On a GPU: deltas go to the CPU and back without a wait, and times are read off the model's own device."""

from __future__ import annotations

import pytest
import torch
from runs import noise, recipe
from test_session import SIGMAS, Model, session

from hasten.report import Clock

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [1, 2])
def test_deltas_on_the_cpu_give_the_same_and_nothing_waits(rows: int) -> None:
    x, outs = noise(rows, 64, 32, seed=1).cuda(), {}
    for device in ("auto", "cpu"):
        run = session(recipe("interval", every=2, predictor="taylor", last=False, device=device))
        model = Model(*[lambda x: x * 1.5 + 1.0] * 3)
        found = []
        for i, sigma in enumerate(SIGMAS[:-1]):
            # The kernel and the pinned memory are had by the third evaluation.
            torch.cuda.set_sync_debug_mode("error" if i > 2 else "default")
            try:
                found.append(model(run, x + i, sigma, conditions=("a", "b")[:rows]))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert run.report.strip == "C.C.C"
        outs[device] = torch.stack(found).cpu()
    assert torch.equal(outs["auto"], outs["cpu"])


def test_deltas_on_the_cpu_lie_in_pinned_memory() -> None:
    run = session(recipe("interval", every=2, last=False, device="cpu"))
    Model(*[lambda x: x * 1.5] * 3)(run, noise(1, 64, 32, seed=1).cuda(), 1.0)
    (lane,) = run._lanes.values()
    assert all(delta.is_pinned() for history in lane.histories.values() for delta in history.deltas)


def test_the_clock_measures_the_work_of_the_device_that_it_was_given() -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)  # not the current one where there are two
    x = torch.ones(4096, 4096, device=device)
    torch.cuda.synchronize(device)
    clock = Clock()
    clock.start(device)
    for _ in range(20):
        x = x @ x * 1e-4
    read = clock.stop()
    assert read() > 0.0
    assert torch.cuda.current_device() == 0
