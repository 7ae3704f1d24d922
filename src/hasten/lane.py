"""lane.py is what is remembered: a lane is one trajectory, a history what it keeps at one seam.

All tensors here are the lane's own, never references to a host's: hosts add into theirs in place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from torch import Tensor

from hasten.moment import Moment
from hasten.policy import Decision, Policy


@dataclass
class History:
    """What one lane remembers at one seam. All tensors are its own, never references to a host's."""

    reference: Tensor | None = None
    sigmas: list[float] = field(default_factory=list)
    deltas: list[Tensor] = field(default_factory=list)

    def remember(self, sigma: float, delta: Tensor, window: int) -> None:
        """Keeps `delta` as the newest; one at the same sigma is replaced, those beyond `window` are dropped."""
        if self.sigmas and self.sigmas[-1] == sigma:
            self.sigmas.pop()
            self.deltas.pop()
        self.sigmas.append(sigma)
        self.deltas.append(delta)
        del self.sigmas[:-window], self.deltas[:-window]

    def forget_unlike(self, image: Tensor) -> bool:
        """Drops all of it, and says so, where it is of other tokens than `image`, (B, N, C).

        A host's other patches may add or drop image tokens within a run: a delta of other tokens cannot stand in.
        """
        if all(tensor.shape[1:] == image.shape[1:] for tensor in self.tensors()):
            return False
        self.reference = None
        self.sigmas.clear()
        self.deltas.clear()
        return True

    def tensors(self) -> list[Tensor]:
        """Every tensor that is kept here."""
        return [*self.deltas, *([] if self.reference is None else [self.reference])]


@dataclass
class Lane:
    """One trajectory: a condition at one shape, dtype and device, and one ordinal within an interval.

    input, output_norm and rate are the whole-model signal's (EasyCache).
    """

    histories: dict[int, History] = field(default_factory=dict)
    planned: bool = False
    input: Tensor | None = None
    output: tuple[Tensor, Tensor] | None = None
    rate: Tensor | None = None

    def at(self, seam: int) -> History:
        """The history at a seam, empty when new."""
        return self.histories.setdefault(seam, History())

    def mebibytes(self) -> float:
        """Memory of everything that this lane keeps."""
        kept = [t for history in self.histories.values() for t in history.tensors()]
        kept += [t for t in (self.input, *(self.output or ())) if t is not None]
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
