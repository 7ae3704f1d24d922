"""report.py says what happened: every evaluation's decision, change and milliseconds.

Times on a GPU are CUDA events that are read when the run is over, so that nothing waits while it lasts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hasten.kernels.on_device import on_device


@dataclass
class Evaluation:
    """One model evaluation. block: the first block that was stood in for, when reused. ms: all its calls together."""

    index: int
    interval: int
    sigma: float
    decision: str
    change: float | None
    block: int | None
    reason: str
    lanes: int = 0
    ms: float = 0.0
    times: list[Callable[[], float]] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        keys = ("index", "interval", "sigma", "lanes", "decision", "change", "block", "reason", "ms")
        plain = {key: getattr(self, key) for key in keys}
        if self.change is not None and not math.isfinite(self.change):
            plain["change"] = None  # JSON knows neither NaN nor infinity; the reason tells of it
        return plain


@dataclass
class Report:
    """One sampling run: its evaluations, what was reused, what it kept in memory, and remarks.

    model: what was done to the model itself, such as "blocks in fp8, compiled". graphs, compile_s: what the compiler
    did since the run before, and how long it took; first calls of a shape or of other modules.
    timed: whether its milliseconds are of work done; on some devices they are only of launching it.
    """

    recipe: dict[str, Any]
    intervals: int
    evaluations: list[Evaluation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cache_mib: float = 0.0
    cache_mib_planned: float = 0.0
    wall_s: float = 0.0
    timed: bool = True
    model: str = ""
    graphs: int = 0
    compile_s: float = 0.0

    @property
    def computed(self) -> int:
        """How many evaluations ran the blocks in full."""
        return sum(e.decision == "compute" for e in self.evaluations)

    @property
    def partial(self) -> int:
        """How many evaluations refreshed or forecast what is inside the blocks."""
        return sum(e.decision == "partial" for e in self.evaluations)

    @property
    def reused(self) -> int:
        """How many evaluations were stood in for."""
        return sum(e.decision == "reuse" for e in self.evaluations)

    @property
    def strip(self) -> str:
        """One letter for each evaluation: C computed, P partial, . reused."""
        letters = {"compute": "C", "reuse": ".", "partial": "P"}
        return "".join(letters[e.decision] for e in self.evaluations)

    @property
    def estimated_speedup(self) -> float:
        """What computing everything would have taken over what was taken; from this run's own times.

        The first evaluation of each kind may also load, compile and tune what stays: it counts as its kind's median.
        """
        kinds: dict[str, list[float]] = {}
        for evaluation in self.evaluations:
            kinds.setdefault(evaluation.decision, []).append(evaluation.ms)
        typical = {kind: sorted(times)[(len(times) - 1) // 2] for kind, times in kinds.items()}
        spent = sum(sum(times) - max(times[0] - typical[kind], 0.0) for kind, times in kinds.items())
        return typical["compute"] * len(self.evaluations) / spent if "compute" in kinds and spent > 0 else 1.0

    def note(self, text: str) -> None:
        """Adds a remark once."""
        if text not in self.notes:
            self.notes.append(text)

    def read_times(self) -> Report:
        """This report with its times so far read off; on a GPU this waits for the device once."""
        for evaluation in self.evaluations:
            evaluation.ms += sum(read() for read in evaluation.times)
            evaluation.times.clear()
        self.wall_s = sum(e.ms for e in self.evaluations) / 1000.0
        return self

    def line(self, *, estimate: bool = True) -> str:
        """The run in one line, such as `computed 12 of 28 · about 2.1x · cache 72.0 MiB`.

        estimate: whether to say how much faster the model alone was, by this run's own times.
        """
        parts = [f"computed {self.computed} of {len(self.evaluations)}"]
        last: list[str] = []
        if self.partial:
            parts[0] += f", {self.partial} in part"
        if self.reused or self.partial:
            if self.timed and estimate:
                parts.append(f"about {self.estimated_speedup:.1f}x")
            parts.append(f"cache {self.cache_mib:.1f} MiB")
        elif self.evaluations and not self.recipe.get("cache"):
            parts.append("no cache asked for")
        elif self.evaluations:
            # Behind the remarks, which may say what the figures mean.
            last.append(f"nothing reused: {self._why_nothing()}")
        skipped = sum(map(len, (self.recipe.get("skip") or {}).values()))
        if skipped:
            parts.append(f"{skipped} block{'s' * (skipped > 1)} skipped")
        if self.model:
            parts.append(self.model)
        if self.graphs:
            parts.append(f"{self.graphs} graph{'s' * (self.graphs > 1)} compiled in {self.compile_s:.1f} s")
        return " · ".join([*parts, *self.notes, *last])

    def _why_nothing(self) -> str:
        """What kept every evaluation from reuse; where changes were measured, the one that came closest."""
        measured = [e for e in self.evaluations if e.change is not None and math.isfinite(e.change)]
        if measured:
            closest = min(measured, key=lambda e: e.change if e.change is not None else 0.0)
            return f"at the closest {closest.reason}"
        reasons = [e.reason for e in self.evaluations if e.reason not in ("first", "last", "fresh lane")]
        if not reasons:
            return "too few steps"
        return max(set(reasons), key=reasons.count)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema": 1,
            "recipe": self.recipe,
            "evaluations": [e.to_dict() for e in self.evaluations],
            "computed": self.computed,
            "partial": self.partial,
            "reused": self.reused,
            "wall_s": self.wall_s,
            "cache_mib": self.cache_mib,
            "cache_mib_planned": self.cache_mib_planned,
            "model": self.model,
            "graphs": self.graphs,
            "compile_s": self.compile_s,
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return self.line()

    def __repr__(self) -> str:
        return f"<Report: {self.line()}>"


# Devices on which a Clock measures work done. Elsewhere (MPS) the wall clock sees only its launch.
TIMED = ("cpu", "cuda")


class Clock:
    """Times spans of work on a device: CUDA events on its current stream on a GPU, the wall clock elsewhere."""

    def __init__(self) -> None:
        self._started: float | torch.cuda.Event = 0.0
        self._device = torch.device("cpu")

    def start(self, device: torch.device) -> None:
        """Marks the beginning."""
        self._device = device
        self._started = _event(device) if device.type == "cuda" else time.perf_counter()

    def wait(self) -> None:
        """Until the device has come to the beginning."""
        if not isinstance(self._started, float):
            self._started.synchronize()

    def stop(self) -> Callable[[], float]:
        """Marks the end; gives a function that reads the milliseconds later."""
        started = self._started
        if isinstance(started, float):
            elapsed = (time.perf_counter() - started) * 1000.0
            return lambda: elapsed
        ended = _event(self._device)

        def read() -> float:
            ended.synchronize()
            return float(started.elapsed_time(ended))

        return read


def _event(device: torch.device) -> torch.cuda.Event:
    # The model's own device: the thread's current one is another where several GPUs are used.
    with on_device(device):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    return event
