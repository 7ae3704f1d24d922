"""call.py is one model call of an evaluation: what gates act through, from the seam to the stand-in.

It measures at a seam, asks the policy once an evaluation, remembers deltas after a computed span and sums them
up for a reused one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.weighted_sum import weighted_sum
from hasten.lane import Ongoing, Row, Watch
from hasten.plan import Plan
from hasten.policy import Decision
from hasten.predict import Predictor
from hasten.recipe import Cache
from hasten.report import Clock, Report
from hasten.seam import Signal
from hasten.signal import largest, mean_abs

# Kinds of devices that work on while the host waits for a number.
AHEAD = {"cuda"}


@dataclass(frozen=True)
class Terms:
    """What every call of a run works under. lock: calls of one evaluation may run side by side, each in its thread."""

    cache: Cache
    plan: Plan
    predictor: Predictor
    report: Report
    watch: Watch | None = None
    lock: AbstractContextManager[Any] = field(default_factory=RLock)


def copy_of(image: Tensor) -> Tensor:
    """The tokens of a host's tensor in one of our own: Comfy's blocks add in place."""
    return image.detach().clone()


class Call:
    """One model call of an evaluation, with its lanes' rows; gates act through it."""

    def __init__(self, terms: Terms, ongoing: Ongoing, rows: list[Row]) -> None:
        self.terms, self.ongoing, self.rows = terms, ongoing, rows
        self.plan = terms.plan
        self.standing_in = False
        self.refreshing = False
        self.ahead: list[Tensor] | None = None  # a partial evaluation's tokens after the last block, known at block 0
        self.excuse = ""
        # What a host does with the stand-in, (B, N, C), while the decision is still on its way from the device.
        self.onward: Callable[[Tensor], None] = lambda image: None
        self.clock = Clock()
        self._seam = 0
        self._kept: dict[int, Tensor] = {}
        self._entries: dict[int, Tensor] = {}
        self._signals: dict[int, Tensor] = {}
        self._stood: Tensor | None = None

    def keep_entry(self, block: int, image: Tensor) -> None:
        """Keeps a block's input because a residual is measured from it."""
        self.take_entry(block, copy_of(image))

    def take_entry(self, block: int, copy: Tensor) -> None:
        """keep_entry's copy, where it was made before the call entered."""
        self._entries[block] = copy

    def keep_seam(self, seam: int, image: Tensor) -> None:
        """Keeps a span's input, (B, N, C), where nothing is measured or decided at it."""
        self._kept[seam] = image.detach().clone()

    def arrive(self, seam: int, image: Tensor, modulated: Callable[[], Tensor] | None = None) -> None:
        """At a seam: measures, decides (or follows the evaluation's decision), and keeps the seam's input or stands in.

        image: (B, N, C). modulated: gives block 0's modulated input, (B, N, C), where the plan measures that.
        """
        image = image.detach()
        # Not `any` over a generator: each row's history is looked at.
        if any([row.lane.at(seam).forget_unlike(image) for row in self.rows]):
            self.terms.report.note("the number of image tokens changed: computed afresh from there")
        self._plan_memory(image)
        entry = self._entries.pop(self.plan.entries.get(seam, -1), None)
        cache = self.terms.cache
        signal = Signal(self.plan.signal, cache, image, entry, lambda: self._modulated_input(modulated))
        ongoing = self.ongoing
        fresh = any(not row.lane.at(seam).deltas for row in self.rows)
        self._stood = None
        with self.terms.lock:
            if ongoing.decision is None:
                self._decide(seam, image, signal, fresh)
            elif ongoing.decision is Decision.REUSE and seam == ongoing.seam:
                # Another lane's call took the decision; a lane without history computes all the same.
                self._follow(seam, fresh)
        self._refer(seam, signal)
        if not self.standing_in:
            # Blocks and hosts add in place: a copy, not a reference.
            self._stood = None
            self._kept[seam] = image.clone()
        elif self._stood is None:
            # At once, for what lies in `image` by the end of the span is the host's.
            self._stand(seam, image)

    def finish(self, image: Tensor) -> None:
        """After the span's last block was run: each seam's delta goes into its lanes' histories."""
        if self.ongoing.decision is None:
            self.settle(Decision.COMPUTE, reason=self.ongoing.reason or "computed")
        cache = self.terms.cache
        image = image.detach()
        sigma = self.ongoing.moment.sigma
        for seam, signal in self._signals.items():
            self._keep_reference(seam, signal)
        self._signals.clear()
        for seam, kept in self._kept.items():
            if cache.dtype == "float32":
                delta = image.to(torch.float32) - kept.to(torch.float32)
            else:
                delta = torch.sub(image, kept, out=kept)  # the seam's copy has served: its memory holds the delta
            for row in self.rows:
                own = delta if len(self.rows) == 1 else delta[row.rows].clone()
                history = row.lane.at(seam)
                if self.terms.watch is not None:
                    self.terms.watch(self.ongoing.moment, history, own)
                history.remember(sigma, own, self.terms.predictor.window, on_cpu=cache.device == "cpu")
        self._kept.clear()

    def stand_in(self) -> Tensor:
        """The seam's input plus the weighted deltas, (B, N, C)."""
        stood, self._stood = self._stood, None
        if stood is None:
            stood = self._summed(self._seam, self._kept.pop(self._seam))
        self._kept.clear()
        return stood

    def settle(self, decision: Decision, *, reason: str, forced: bool = False) -> None:
        """Fixes the evaluation's decision; its policy learns of it once."""
        self.ongoing.decision, self.ongoing.reason = decision, reason
        self.ongoing.policy.settled(self.ongoing.moment, decision, forced=forced)

    def _plan_memory(self, image: Tensor) -> None:
        """Adds to the report what each new lane will come to keep, before it does."""
        cache, plan = self.terms.cache, self.plan
        size = 4 if cache.dtype == "float32" else image.element_size()
        compared = image.element_size() if self.ongoing.policy.needs_change else 0
        if plan.whole_model:
            compared *= 3  # the latest input, and the last computed one with its output
        each = image.numel() // len(self.rows) * len(plan.seams or (0,))
        for row in self.rows:
            if not row.lane.planned:
                row.lane.planned = True
                planned = each * (size * self.terms.predictor.window + compared)
                self.terms.report.cache_mib_planned += planned / 2**20

    def _stand(self, seam: int, image: Tensor) -> None:
        self._stood = self._summed(seam, image)
        self.onward(self._stood)

    def _summed(self, seam: int, base: Tensor) -> Tensor:
        if len(self.rows) == 1:
            return self._predicted(seam, self.rows[0], base)
        return torch.cat([self._predicted(seam, row, base[row.rows]) for row in self.rows])

    def _predicted(self, seam: int, row: Row, base: Tensor) -> Tensor:
        history = row.lane.at(seam)
        weights = self.terms.predictor.weights(history.sigmas, self.ongoing.moment)
        deltas = [history.delta(i, base.device) for i, w in enumerate(weights) if w != 0.0]
        return weighted_sum(base, deltas, [w for w in weights if w != 0.0])

    def _decide(self, seam: int, image: Tensor, signal: Signal, fresh: bool) -> None:
        ongoing, policy = self.ongoing, self.ongoing.policy
        last_seam = seam == self.plan.seams[-1]
        reason = policy.forced(ongoing.moment)
        if reason is not None:
            self.settle(Decision.COMPUTE, reason=reason, forced=True)
            return
        if fresh:
            if last_seam:
                self.settle(Decision.COMPUTE, reason="fresh lane", forced=True)
            return
        change = None
        if policy.needs_change:
            # On a GPU the stand-in is made while the change is on its way: if the blocks are to run, it is dropped.
            early = image.device.type in AHEAD and len(self.plan.seams) == 1
            change = self._change(seam, signal, (lambda: self._stand(seam, image)) if early else None)
        ongoing.change = change
        if policy.needs_change and change is None:
            if last_seam:
                self.settle(Decision.COMPUTE, reason="nothing to compare with", forced=True)
            return
        decision = policy.decide(ongoing.moment, change, seam)
        reason = policy.rule.why(change, seam)
        if decision is Decision.REUSE:
            ongoing.seam = self._seam = seam
            self.standing_in = True
        elif not last_seam:
            ongoing.reason = reason  # the walk goes on to the next seam
            return
        self.settle(decision, reason=reason)

    def _follow(self, seam: int, fresh: bool) -> None:
        if fresh:
            self.terms.report.note("a lane without history computed while another reused")
            return
        self._seam = seam
        self.standing_in = True

    def _change(self, seam: int, signal: Signal, meanwhile: Callable[[], None] | None) -> float | None:
        """The largest change among this call's lanes; one synchronisation."""
        changes = []
        for row in self.rows:
            change = signal.change(row.rows, row.lane.at(seam).reference)
            if change is None:
                return None
            changes.append(change)
        return largest(changes, meanwhile)

    def _refer(self, seam: int, signal: Signal) -> None:
        """Keeps the signal as the next one to compare with: at once, or when this evaluation proves computed."""
        latest = self.terms.cache.compares_with_latest()
        # A walk may still end in reuse at a later seam: then nothing was computed, and nothing moves.
        own = signal.own() if latest or not self.standing_in else None
        if own is None:
            return
        if latest:
            self._keep_reference(seam, own)
        else:
            self._signals[seam] = own

    def _keep_reference(self, seam: int, signal: Tensor) -> None:
        for row in self.rows:
            row.lane.at(seam).reference = signal if len(self.rows) == 1 else signal[row.rows].clone()

    def _modulated_input(self, modulated: Callable[[], Tensor] | None) -> Tensor | None:
        """Block 0's, (B, N, C), or None where nobody gives it or its weights are elsewhere."""
        if modulated is None:
            return None
        try:
            return modulated().detach()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # weights that an offload hook brings only when the block itself is run
            self.terms.report.note(
                "the first block's modulated input cannot be looked at while its weights are offloaded: everything "
                "was computed; offload leaf by leaf, or take fbcache, which looks at what the block gives out"
            )
            return None

    # The whole model as one span (EasyCache): input and output are the model's own, (B, ...).

    def weigh_model(self, x: Tensor) -> Tensor | None:
        """At the model's door: the stand-in for its output, or None when it has to be run. x: its noise channels."""
        ongoing, x = self.ongoing, x.detach()
        fresh = any(not row.lane.at(-1).deltas for row in self.rows)
        with self.terms.lock:
            if ongoing.decision is None:
                self._decide_model(x, fresh)
        if ongoing.decision is Decision.REUSE and fresh:
            self.terms.report.note("a lane without history computed while another reused")
        elif ongoing.decision is Decision.REUSE:
            self.standing_in = True
        if self.terms.cache.compares_with_latest() or not self.standing_in:
            for row in self.rows:
                row.lane.input = x[row.rows].clone()
        self._plan_memory(x)
        self._seam = -1
        self._kept[-1] = x.clone() if not self.standing_in else x
        return self.stand_in() if self.standing_in else None

    def observe_model(self, x: Tensor, output: Tensor) -> None:
        """After the model was run: its rate of change, its size and its delta are remembered."""
        x, output = x.detach(), output.detach()
        for row in self.rows:
            lane, mine = row.lane, output[row.rows]
            if lane.output is not None:
                came_in, went_out = lane.output
                moved = mean_abs(x[row.rows] - came_in)
                lane.rate = mean_abs(mine - went_out) / moved.clamp_min(1e-12)
            lane.output = (x[row.rows].clone(), mine.clone())
        self.finish(output)

    def _decide_model(self, x: Tensor, fresh: bool) -> None:
        ongoing, policy = self.ongoing, self.ongoing.policy
        reason = policy.forced(ongoing.moment)
        if reason is None and fresh:
            reason = "fresh lane"
        if reason is None and any(row.lane.rate is None for row in self.rows):
            reason = "nothing to compare with"
        if reason is not None:
            self.settle(Decision.COMPUTE, reason=reason, forced=True)
            return
        changes = []
        for row in self.rows:
            lane = row.lane
            assert lane.rate is not None and lane.input is not None and lane.output is not None
            moved = mean_abs(x[row.rows] - lane.input)
            changes.append(lane.rate * moved / mean_abs(lane.output[1]).clamp_min(1e-12))
        ongoing.change = largest(changes)
        decision = policy.decide(ongoing.moment, ongoing.change)
        self.settle(decision, reason=policy.rule.why(ongoing.change, 0))
