"""lane.py is what is remembered: a lane is one trajectory, a history what it keeps at one seam.

All tensors here are the lane's own, never references to a host's: hosts add into theirs in place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.inside import Inside
from hasten.kept import moved_to_cpu
from hasten.moment import Moment
from hasten.policy import Decision, Policy


@dataclass
class History:
    """What one lane remembers at one seam. All tensors are its own, never references to a host's.

    ready: for each delta, the event after which it may be read; None where it may be at once.
    """

    reference: Tensor | None = None
    sigmas: list[float] = field(default_factory=list)
    deltas: list[Tensor] = field(default_factory=list)
    ready: list[torch.cuda.Event | None] = field(default_factory=list)

    def remember(self, sigma: float, delta: Tensor, window: int, *, on_cpu: bool = False) -> None:
        """Keeps `delta` as the newest; one at the same sigma is replaced, those beyond `window` are dropped."""
        if self.sigmas and self.sigmas[-1] == sigma:
            del self.sigmas[-1], self.deltas[-1], self.ready[-1]
        kept, event = moved_to_cpu(delta) if on_cpu else (delta, None)
        self.sigmas.append(sigma)
        self.deltas.append(kept)
        self.ready.append(event)
        del self.sigmas[:-window], self.deltas[:-window], self.ready[:-window]

    def delta(self, index: int, device: torch.device) -> Tensor:
        """A remembered delta on that device, without waiting for it."""
        event = self.ready[index]
        if event is not None:
            torch.cuda.current_stream(device).wait_event(event)
        return self.deltas[index].to(device, non_blocking=True)

    def forget_unlike(self, image: Tensor) -> bool:
        """Drops all of it, and says so, where it is of other tokens than `image`, (B, N, C).

        A host's other patches may add or drop image tokens within a run: a delta of other tokens cannot stand in.
        """
        if all(tensor.shape[1:] == image.shape[1:] for tensor in self.tensors()):
            return False
        self.reference = None
        self.sigmas.clear()
        self.deltas.clear()
        self.ready.clear()
        return True

    def tensors(self) -> list[Tensor]:
        """Every tensor that is kept here."""
        return [*self.deltas, *([] if self.reference is None else [self.reference])]


@dataclass
class Lane:
    """One trajectory: a condition at one shape, dtype and device, and one ordinal within an interval.

    seen: the latest evaluation that it took part in. input, output and rate are the whole-model signal's (EasyCache),
    inside is what is remembered within the blocks (ToCa).
    """

    histories: dict[int, History] = field(default_factory=dict)
    planned: bool = False
    seen: int = 0
    input: Tensor | None = None
    output: tuple[Tensor, Tensor] | None = None
    rate: Tensor | None = None
    inside: Inside | None = None

    def at(self, seam: int) -> History:
        """The history at a seam, empty when new."""
        return self.histories.setdefault(seam, History())

    def mebibytes(self) -> float:
        """Memory of everything that this lane keeps."""
        kept = [t for history in self.histories.values() for t in history.tensors()]
        kept += [t for t in (self.input, *(self.output or ())) if t is not None]
        kept += [] if self.inside is None else self.inside.tensors()
        return sum(t.numel() * t.element_size() for t in kept) / 2**20


@dataclass
class Ongoing:
    """The evaluation under way: its moment and, once taken, its decision."""

    moment: Moment
    policy: Policy
    asked: float
    decision: Decision | None = None
    seam: int = 0
    change: float | None = None
    reason: str = ""
    seen: set[Hashable] = field(default_factory=set)
    entry: int = 0


@dataclass
class Row:
    """One lane's rows of a call's batch."""

    lane: Lane
    rows: slice


# Sees each delta that a computed evaluation leaves, before the history takes it: for calibration and fitting.
Watch = Callable[[Moment, History, Tensor], None]
