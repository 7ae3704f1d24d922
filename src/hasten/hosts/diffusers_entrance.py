"""diffusers_entrance.py is a call of the model on its way into its session, while its time comes from the device.

What is launched before it enters (embedders, blocks that run whatever is decided) a GPU does meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hasten.call import Call, copy_of
from hasten.hosts.diffusers_families import Family
from hasten.report import Clock
from hasten.session import Session
from hasten.signal import on_its_way


class Entrance:
    """A call that begins now. given: the forward's arguments; sigma: the schedule's entry, where the host knows it."""

    def __init__(self, session: Session, family: Family, given: Mapping[str, Any], sigma: float | None) -> None:
        self.given = given
        self._session, self._family, self._sigma = session, family, sigma
        self._entries: dict[int, Tensor] = {}
        self._clock = Clock()
        x, timestep = given["hidden_states"], given["timestep"]
        if sigma is None:
            wait = self._clock.wait if timestep.device == x.device else None
            self._time = on_its_way(timestep.flatten()[0], wait)
        self._clock.start(x.device)  # right behind the time, whose arrival it marks too

    def come_by(self, block: int, image: Tensor) -> None:
        """Keeps a copy of a block's input, (B, N, C): a residual may be measured from it."""
        self._entries[block] = copy_of(image)

    def enter(self) -> Call:
        """The call within its session; waits for its time."""
        session, family, known = self._session, self._family, self._sigma
        call = session.enter(
            [session.identity(family.condition(self.given))],
            self.given["hidden_states"],
            sigma=family.sigma(self._time()) if known is None else known,
            rounded_in=self.given["timestep"].dtype if known is None else torch.float32,
            clock=self._clock,
        )
        for block, image in self._entries.items():
            call.take_entry(block, image)
        return call
