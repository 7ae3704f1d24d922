"""gate.py is the hot path: run a block, or stand in for it. One gate a block, one call at a time.

A gate is the eager hook around a block's (perhaps compiled) forward. It never knows which host it hangs in: the
host hands it the block's streams and a function that runs the block on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from hasten.call import Call
from hasten.parts import Parts
from hasten.token_gate import TokenGate
from hasten.walk import Walk


class Streams(Protocol):
    """What flows from block to block in a host, with the image tokens in reach."""

    @property
    def image(self) -> Tensor:
        """The image tokens, (B, N, C)."""

    def modulated(self) -> Tensor:
        """The first block's image tokens after norm, scale and shift, (B, N, C)."""


S = TypeVar("S", bound=Streams)


class Gate:
    """One block's gate."""

    def __init__(self, block: int) -> None:
        self.block = block
        self._inside = TokenGate(block)

    @torch.compiler.disable
    def __call__(
        self,
        call: Call,
        streams: S,
        run: Callable[[], S],
        replace: Callable[[Tensor], S],
        parts: Parts | None = None,
        walk: Callable[[], Walk | None] = lambda: None,
    ) -> S:
        """The block's streams after it: run, passed through, or stood in for.

        run: runs the block on `streams`. replace: the host's streams with the image tokens replaced. parts: the way
        into the block, for caches that reach inside; walk: into all blocks at once, where nothing lies between them.
        """
        if parts is not None:
            after: S = self._inside(call, streams, parts, run, replace, walk)
            return after
        plan, block = call.plan, self.block
        if not call.standing_in and block in plan.seams:
            call.arrive(block, streams.image, streams.modulated)
        if call.standing_in:
            # Between blocks hosts may have added ControlNet residuals; they are inside the delta already.
            return replace(call.stand_in()) if block == plan.end else streams
        if block in plan.entries_from:
            call.keep_entry(block, streams.image)
        after = streams if block in plan.skip else run()
        if block == plan.end and plan.seams:
            call.finish(after.image)
        return after


def gate_model(call: Call, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """The model's output, run or stood in for, where the whole model is the span.

    x: the model's input cut to its noise channels, (B, ...); the output has x's shape.
    """
    stand_in = call.weigh_model(x)
    if stand_in is not None:
        return stand_in
    output = run()
    call.observe_model(x, output)
    return output
