"""moment.py says WHERE in a run an evaluation lies, from sigmas and never from counting calls.

Samplers call a model more than once a step (Heun, dpm_2, SDE), start late (img2img) and stop early; pipelines
hand sigma over in bf16, where neighbours blur. It sees floats, never tensors.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """One model evaluation.

    index: evaluations before it in this run. interval: where its sigma lies in the schedule, 0 to intervals - 1.
    sigma: the schedule's entry it belongs to, or its own where it lies between two.
    ordinal: evaluations before it in the same interval; each ordinal is a trajectory of its own (Heun).
    before: steps of the whole schedule that this run leaves out at its beginning (img2img).
    """

    index: int
    interval: int
    intervals: int
    sigma: float
    ordinal: int = 0
    before: int = 0

    @property
    def step(self) -> int:
        """Where it lies in the whole schedule: what lists and tables made for whole runs are read by."""
        return self.before + self.interval

    @property
    def steps(self) -> int:
        """How many steps the whole schedule has."""
        return self.before + self.intervals


class Timeline:
    """A run's sigmas, falling, the final one included, each once.

    before: steps of the whole schedule that the run leaves out at its beginning.
    """

    def __init__(self, sigmas: Sequence[float], *, before: int = 0) -> None:
        entries: list[float] = []
        for value in (float(s) for s in sigmas):
            if not entries or value < entries[-1]:
                entries.append(value)
            elif value > entries[-1]:
                raise ValueError(
                    f"the run's sigmas rise from {entries[-1]:g} to {value:g}: a schedule that falls is expected, "
                    "as the scheduler's `sigmas` has it."
                )
        if len(entries) < 2:
            raise ValueError(
                f"the run's sigmas are {list(map(float, sigmas))}: at least two different ones are needed, the final "
                "one included, as the scheduler's `sigmas` has them."
            )
        self.sigmas = tuple(entries)
        self.before = before

    @classmethod
    def sorted(cls, sigmas: Sequence[float]) -> Timeline:
        """Those sigmas in falling order, whatever theirs is: places for a run of which nothing is foretold."""
        found = sorted({float(s) for s in sigmas if s == s}, reverse=True)
        return cls(found if len(found) > 1 else [1.0, 0.0])

    @property
    def intervals(self) -> int:
        """How many steps the schedule has."""
        return len(self.sigmas) - 1

    def place(self, sigma: float, *, tolerance: float = 0.0, after: int | None = None) -> tuple[int, float]:
        """The interval that `sigma` lies in, and the schedule's entry it stands for (itself when between two).

        tolerance: how far rounding may have moved it, relative (2**-7 for bfloat16).
        after: the entry of the evaluation before, where several entries are equally near: time moves on.
        """
        # 1e-4: float32 sigmas survive samplers' own arithmetic only to about that (seen with eight samplers).
        reach = max(tolerance, 1e-4) * max(abs(sigma), 1e-6)
        near = [i for i, entry in enumerate(self.sigmas) if abs(entry - sigma) <= reach]
        if near:
            entry = min(near, key=lambda i: abs(self.sigmas[i] - sigma))
            if len(near) > 1 and after is not None:
                entry = next((i for i in near if i > after), near[-1])
            return min(entry, self.intervals - 1), self.sigmas[entry]
        falling = [-entry for entry in self.sigmas]
        return min(max(bisect_right(falling, -sigma) - 1, 0), self.intervals - 1), sigma
