"""walk.py takes a partial evaluation through all blocks at once, and from its second time on plays it as a CUDA graph.

A partial evaluation is some six hundred short kernels: launched one by one, the host takes several times as long as the
GPU. Where nothing lies between the blocks the first gate runs them all, and the second time a run does so its launches
are recorded. What is remembered keeps its addresses, so a recording holds until the run ends; where anything moved, it
is made anew. It knows nothing of hosts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hasten.call import Call
from hasten.capture import Recorded, Run, obstacle
from hasten.kernels.gated_forecast import TERMS
from hasten.parts import Parts


class Walk(Protocol):
    """All blocks of one call, as a host gives access to them where nothing lies between them.

    given: what changes from call to call: image, text and the vector of the modulation. weights: every tensor that is
    read besides, None where they may move while the run lasts, so that nothing can be recorded. state: whatever else
    the launches depend on, such as the strengths of adapters.
    """

    given: tuple[Tensor, ...]
    weights: Sequence[Tensor] | None
    state: Hashable

    def parts(self, given: Sequence[Tensor]) -> list[Parts]:
        """Each block's, for those inputs."""

    def streams(self, given: Sequence[Tensor]) -> Any:
        """The host's streams before the first block."""


def through(parts: list[Parts], streams: Any, each: Callable[[int, Parts, list[Tensor]], list[Tensor]]) -> list[Tensor]:
    """The tokens after the last block. each: a block's tokens after it, from its index, its parts and those before."""
    tensors = parts[0].tensors(streams)
    for block, (before, now) in enumerate(itertools.pairwise([parts[0], *parts])):
        if len(now.tracks) != len(tensors):
            tensors = now.tensors(before.streams(tensors))
        tensors = each(block, now, tensors)
    return tensors


def walked(call: Call, walk: Walk, fits: Callable[[], bool], run: Run) -> list[Tensor] | None:
    """The walk's outcome: played where it is recorded, recorded where that is worth it, or run.

    fits: whether what is remembered stands for these very tokens; None is given out where it does not.
    """
    first, given = call.rows[0].lane.inside, walk.given
    assert first is not None
    may = _may_record(call, walk)
    reads = _reads(call, walk) if may and first.walks else []
    if first.recorded is not None and reads and first.recorded.fits(given, reads, walk.state):
        return first.recorded.play(given)
    first.recorded = None
    if not fits():
        return None
    first.walks += 1
    if not reads:
        return run(given)  # its kernels are compiled the first time; without weights there is nothing to record
    try:
        first.recorded = Recorded(run, given, reads, walk.state)
    except Exception as error:  # layers that wait for the device or fetch their weights: kinds of torch's own
        first.walks = NEVER
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        call.terms.report.note(f"evaluations in part could not be recorded and were launched one by one ({reason})")
        return run(given)
    return first.recorded.play(given)


def _reads(call: Call, walk: Walk) -> list[Tensor]:
    """Every tensor whose address a recording takes."""
    return [*(walk.weights or ()), *(t for row in call.rows if row.lane.inside for t in row.lane.inside.tensors())]


# Recordings that one lane of a run makes at most: a host that parts its calls anew each time would only record.
MOST = 8
# So many walks as no run takes: nothing is recorded any more.
NEVER = MOST + 1


def _may_record(call: Call, walk: Walk) -> bool:
    tokens, terms = call.plan.tokens, call.terms
    on_host = tokens.memory == "host" or terms.cache.device == "cpu"
    inside = call.rows[0].lane.inside
    # Weights that are numbers would be recorded as they are; those of one history common to all lie in a tensor.
    alike = all(row.lane.inside is not None and len(row.lane.inside.histories) == 1 for row in call.rows)
    held = terms.predictor.window == 1 or (terms.predictor.window <= TERMS and not call.plan.refreshes and alike)
    may = (
        walk.given[0].is_cuda
        and not torch.is_grad_enabled()
        and not torch.cuda.is_current_stream_capturing()
        and walk.weights is not None
        and tokens.record
        and held
        and not on_host
        and inside is not None
        and inside.walks <= MOST
    )
    reason = obstacle() if may else None
    if reason is not None:
        call.terms.report.note(f"evaluations in part were launched one by one: {reason}")
    return may and reason is None
