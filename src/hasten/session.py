"""session.py is one sampling run's memory: Session > Lane > History, born with the run's sigmas, dropped with it.

There is no reset: a run that ends, fails or is interrupted drops its session. An unseen key is a fresh lane, and
a fresh lane always computes. A session knows tensors and sigmas; it knows no host and no module.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from threading import RLock

import torch
from torch import Tensor

from hasten.kernels.weighted_sum import weighted_sum
from hasten.moment import Moment, Timeline
from hasten.plan import Plan
from hasten.policy import Decision, Policy, make_policy
from hasten.predict import Predictor, make_predictor
from hasten.recipe import Recipe
from hasten.report import Clock, Evaluation, Report
from hasten.signal import largest, mean_abs, relative_l1

# How far a model's sigma may have been moved by the dtype that it was handed over in.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


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


class Session:
    """One sampling run: its sigmas, its lanes, one decision for each evaluation, and the report in the end."""

    def __init__(self, recipe: Recipe, plan: Plan, sigmas: Sequence[float], *, watch: Watch | None = None) -> None:
        self.recipe, self.plan = recipe, plan
        self.timeline = Timeline(sigmas)
        self.predictor: Predictor = make_predictor(recipe.cache, self.timeline)
        self.report = Report(recipe=recipe.to_dict(), intervals=self.timeline.intervals)
        self.watch = watch
        self._lanes: dict[Hashable, Lane] = {}
        self._policies: dict[int, Policy] = {}
        self._held: dict[int, object] = {}
        self._visits: dict[int, int] = {}
        self._ongoing: Ongoing | None = None
        self._moved_on = False
        self._count = 0
        # Hosts may run an evaluation's calls on several devices at once, each in its thread.
        self.lock = RLock()

    def identity(self, condition: object) -> int:
        """A key for an object, which the session keeps alive so that the key stays its own."""
        self._held[id(condition)] = condition
        return id(condition)

    def move_on(self) -> None:
        """Told by a host that sees its sampler's steps: the next call belongs to a new evaluation."""
        self._moved_on = True

    def enter(
        self,
        conditions: Sequence[Hashable],
        like: Tensor,
        *,
        sigma: float,
        rounded_in: torch.dtype = torch.float32,
    ) -> Call:
        """The call that begins now. conditions: one key for each equal share of `like`'s batch, in row order.

        like: the model's input, (B, ...), for its shape, dtype and device. sigma: the schedule's entry when the host
        knows it, else the model's argument with the dtype it was rounded in.
        """
        with self.lock:
            ongoing = self._place(sigma, ROUNDING.get(rounded_in, 0.0), conditions)
            share = like.shape[0] // len(conditions)
            shape = (share, *like.shape[1:])
            rows = []
            for i, condition in enumerate(conditions):
                ongoing.seen.add(condition)
                key = (condition, ongoing.moment.ordinal, shape, like.dtype, like.device)
                lane = self._lanes.setdefault(key, Lane())
                rows.append(Row(lane, slice(i * share, (i + 1) * share)))
        call = Call(self, ongoing, rows)
        call.clock.start(like.device)
        return call

    def leave(self, call: Call) -> None:
        """Ends a call that came to its end; one that failed is simply dropped."""
        elapsed = call.clock.stop()
        with self.lock:
            self._leave(call, elapsed)

    def _leave(self, call: Call, elapsed: Callable[[], float]) -> None:
        ongoing = call.ongoing
        if ongoing.decision is None:
            # Nothing was asked (no gate, or a host that ran no gated block): everything was computed.
            call.settle(Decision.COMPUTE, reason=call.excuse or "no cache", forced=True)
        report = self.report
        if not report.evaluations or report.evaluations[-1].index != ongoing.moment.index:
            moment = ongoing.moment
            report.evaluations.append(
                Evaluation(
                    index=moment.index,
                    interval=moment.interval,
                    sigma=moment.sigma,
                    decision=(ongoing.decision or Decision.COMPUTE).value,
                    change=ongoing.change,
                    block=ongoing.seam if ongoing.decision is Decision.REUSE else None,
                    reason=ongoing.reason,
                )
            )
        last = report.evaluations[-1]
        last.lanes += len(call.rows)
        last.times.append(elapsed)
        report.cache_mib = max(report.cache_mib, sum(lane.mebibytes() for lane in self._lanes.values()))

    def close(self) -> Report:
        """Drops every tensor and gives the report, with times read off the device."""
        self._lanes.clear()
        self._held.clear()
        self._policies.clear()
        self._ongoing = None
        return self.report.read_times()

    def _place(self, sigma: float, tolerance: float, conditions: Sequence[Hashable]) -> Ongoing:
        """The evaluation that a call belongs to: the one under way, or a new one."""
        before = self._ongoing
        after = before.entry if before and (self._moved_on or before.seen & set(conditions)) else None
        interval, snapped = self.timeline.place(sigma, tolerance=tolerance, after=after)
        if before is not None and not self._moved_on:
            same_place = interval == before.moment.interval and snapped == before.moment.sigma
            if same_place and not before.seen & set(conditions):
                return before
        self._moved_on = False
        if before is not None and interval < before.moment.interval:
            # Time does not run backwards within a run: take it for a run that began anew.
            self.report.notes.append(f"sigma rose from {before.moment.sigma:.4g} to {snapped:.4g}: started afresh")
            self._lanes.clear()
            self._policies.clear()
            self._visits.clear()
        ordinal = self._visits.get(interval, 0)
        self._visits[interval] = ordinal + 1
        moment = Moment(self._count, interval, self.timeline.intervals, snapped, ordinal)
        self._count += 1
        policy = self._policies.get(ordinal)
        if policy is None:
            policy = self._policies[ordinal] = make_policy(self.recipe.cache, self.plan.seams)
        self._ongoing = Ongoing(moment, policy, entry=interval)
        return self._ongoing


class Call:
    """One model call of an evaluation, with its lanes' rows; gates act through it."""

    def __init__(self, session: Session, ongoing: Ongoing, rows: list[Row]) -> None:
        self.session, self.ongoing, self.rows = session, ongoing, rows
        self.plan = session.plan
        self.standing_in = False
        self.excuse = ""
        self.clock = Clock()
        self._seam = 0
        self._kept: dict[int, Tensor] = {}
        self._entries: dict[int, Tensor] = {}

    def keep_entry(self, block: int, image: Tensor) -> None:
        """Keeps a block's input because a residual is measured from it."""
        # Comfy's blocks add in place: keep a copy, not a reference.
        self._entries[block] = image.clone()

    def arrive(self, seam: int, image: Tensor, modulated: Callable[[], Tensor] | None = None) -> None:
        """At a seam: measures, decides (or follows the evaluation's decision), and keeps the seam's input.

        image: (B, N, C). modulated: gives block 0's modulated input, (B, N, C), where the plan measures that.
        """
        self._kept[seam] = image.clone()
        self._plan_memory(image)
        now = self._signal(seam, self._kept[seam], modulated)
        ongoing = self.ongoing
        fresh = any(not row.lane.at(seam).deltas for row in self.rows)
        with self.session.lock:
            if ongoing.decision is None:
                self._decide(seam, now, fresh)
            elif ongoing.decision is Decision.REUSE and seam == ongoing.seam:
                # Another lane's call took the decision; a lane without history computes all the same.
                self._follow(seam, fresh)
        self._refer(seam, now)

    def finish(self, image: Tensor) -> None:
        """After the span's last block was run: each seam's delta goes into its lanes' histories."""
        if self.ongoing.decision is None:
            self.settle(Decision.COMPUTE, reason=self.ongoing.reason or "computed")
        cache = self.session.recipe.cache
        sigma = self.ongoing.moment.sigma
        for seam, kept in self._kept.items():
            if cache.dtype == "float32":
                delta = image.to(torch.float32) - kept.to(torch.float32)
            else:
                delta = torch.sub(image, kept, out=kept)  # the seam's copy has served: its memory holds the delta
            if cache.device == "cpu":
                delta = delta.to("cpu")
            for row in self.rows:
                own = delta if len(self.rows) == 1 else delta[row.rows].clone()
                history = row.lane.at(seam)
                if self.session.watch is not None:
                    self.session.watch(self.ongoing.moment, history, own)
                history.remember(sigma, own, self.session.predictor.window)
        self._kept.clear()

    def stand_in(self) -> Tensor:
        """The seam's input plus the weighted deltas, (B, N, C)."""
        base = self._kept.pop(self._seam)
        self._kept.clear()
        if len(self.rows) == 1:
            return self._predicted(self.rows[0], base)
        return torch.cat([self._predicted(row, base[row.rows]) for row in self.rows])

    def settle(self, decision: Decision, *, reason: str, forced: bool = False) -> None:
        """Fixes the evaluation's decision; its policy learns of it once."""
        self.ongoing.decision, self.ongoing.reason = decision, reason
        self.ongoing.policy.settled(self.ongoing.moment, decision, forced=forced)

    def _plan_memory(self, image: Tensor) -> None:
        """Adds to the report what each new lane will come to keep, before it does."""
        cache, plan = self.session.recipe.cache, self.plan
        size = 4 if cache.dtype == "float32" else image.element_size()
        compared = image.element_size() if self.ongoing.policy.needs_change else 0
        each = image.numel() // len(self.rows) * len(plan.seams or (0,))
        for row in self.rows:
            if not row.lane.planned:
                row.lane.planned = True
                planned = each * (size * self.session.predictor.window + compared)
                self.session.report.cache_mib_planned += planned / 2**20

    def _predicted(self, row: Row, base: Tensor) -> Tensor:
        history = row.lane.at(self._seam)
        weights = self.session.predictor.weights(history.sigmas, self.ongoing.moment)
        deltas = [d.to(base.device) for d, w in zip(history.deltas, weights, strict=True) if w != 0.0]
        return weighted_sum(base, deltas, [w for w in weights if w != 0.0])

    def _signal(self, seam: int, kept: Tensor, modulated: Callable[[], Tensor] | None) -> Tensor | None:
        if self.plan.signal == "output":
            return kept
        if self.plan.signal == "residual":
            return kept - self._entries.pop(self.plan.entries[seam])
        if self.plan.signal == "modulated" and modulated is not None:
            return modulated()
        return None

    def _decide(self, seam: int, now: Tensor | None, fresh: bool) -> None:
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
        change = self._change(seam, now) if policy.needs_change else None
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
            self.session.report.note("a lane without history computed while another reused")
            return
        self._seam = seam
        self.standing_in = True

    def _change(self, seam: int, now: Tensor | None) -> float | None:
        """The largest change among this call's lanes; one synchronisation."""
        changes = []
        for row in self.rows:
            before = row.lane.at(seam).reference
            if now is None or before is None:
                return None
            relative_to = self.session.recipe.cache.relative_to
            changes.append(relative_l1(now[row.rows], before, relative_to=relative_to))
        return largest(changes)

    def _refer(self, seam: int, now: Tensor | None) -> None:
        """Keeps the signal as the next one to compare with: always the latest, or the last computed one."""
        if now is None or (self.standing_in and not self.session.recipe.cache.compares_with_latest()):
            return
        for row in self.rows:
            shared = len(self.rows) > 1 or self.plan.signal == "output"
            row.lane.at(seam).reference = now[row.rows].clone() if shared else now

    # The whole model as one span (EasyCache): input and output are the model's own, (B, ...).

    def weigh_model(self, x: Tensor) -> Tensor | None:
        """At the model's door: the stand-in for its output, or None when it has to be run. x: its noise channels."""
        ongoing = self.ongoing
        fresh = any(not row.lane.at(-1).deltas for row in self.rows)
        if ongoing.decision is None:
            self._decide_model(x, fresh)
        if ongoing.decision is Decision.REUSE and fresh:
            self.session.report.note("a lane without history computed while another reused")
        elif ongoing.decision is Decision.REUSE:
            self.standing_in = True
        if self.session.recipe.cache.compares_with_latest() or not self.standing_in:
            for row in self.rows:
                row.lane.input = x[row.rows].clone()
        self._plan_memory(x)
        self._seam = -1
        self._kept[-1] = x.clone() if not self.standing_in else x
        return self.stand_in() if self.standing_in else None

    def observe_model(self, x: Tensor, output: Tensor) -> None:
        """After the model was run: its rate of change, its size and its delta are remembered."""
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
