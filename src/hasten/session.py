"""session.py is one sampling run: Session > Lane > Moment, born with the run's sigmas, dropped with it.

There is no reset: a run that ends, fails or is interrupted drops its session. An unseen key is a fresh lane, and
a fresh lane always computes. A session knows tensors and sigmas; it knows no host and no module.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from hasten.call import Call, Terms
from hasten.lane import Lane, Ongoing, Row, Watch
from hasten.moment import Moment, Timeline
from hasten.plan import Plan
from hasten.policy import Decision, Policy, make_policy
from hasten.predict import make_predictor
from hasten.recipe import Cache, Recipe
from hasten.report import TIMED, Clock, Evaluation, Report
from hasten.unused import unused

# How far a model's sigma may have been moved by the dtype that it was handed over in, relative: pipelines round
# twice, the timestep and then its thousandth part.
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

# A lane that took no part in so many evaluations is dropped. Three steps of a sampler that calls the model twice a
# step, so that a condition may pause; a host that makes its conditions anew for every call would pile them up.
UNSEEN = 6

# FLUX's sigmas begin at 1; a run that begins below this is the later part of a whole one.
WHOLE = 0.95


class Session:
    """One sampling run: its sigmas, its lanes, one decision for each evaluation, and the report in the end.

    before: steps of the whole schedule that the run leaves out at its beginning, None where nobody knows.
    forgiving: a schedule that cannot be followed (it rises) is computed in full and noted instead of refused.
    Raises ValueError for such a schedule otherwise. remarks: what the report is to say in any case.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        sigmas: Sequence[float],
        *,
        before: int | None = None,
        watch: Watch | None = None,
        forgiving: bool = False,
        remarks: Sequence[str] = (),
    ) -> None:
        cache, reason = recipe.cache, ""
        try:
            self.timeline = Timeline(sigmas, before=before or 0)
        except ValueError as error:
            if not forgiving:
                raise
            reason = f"computed in full: {str(error).rstrip('.')}"
            self.timeline, plan, cache = Timeline.sorted(sigmas), plan.without_reuse(), Cache()
        self.plan, self._cache, self._followed = plan, cache, not reason
        self.report = Report(recipe=recipe.to_dict(), intervals=self.timeline.intervals)
        whole = before is not None or self.timeline.sigmas[0] >= WHOLE  # else a late part of nobody knows what
        steps = self.timeline.before + self.timeline.intervals if whole else None
        for remark in (*remarks, *unused(recipe.cache, recipe.attention, steps=steps)):
            self.report.note(remark)
        if reason:
            self.report.note(reason)
        elif not whole and cache.method in ("magcache", "schedule"):
            self.report.note(
                f"the run begins at sigma {self.timeline.sigmas[0]:.3g}, at which step of a whole run is not known: "
                f"cache.{'ratios' if cache.method == 'magcache' else 'steps'} are read from their beginning"
            )
        predictor = make_predictor(cache, self.timeline, self.report.note)
        self._terms = Terms(cache, plan, predictor, self.report, watch)
        self._lanes: dict[tuple[Hashable, ...], Lane] = {}
        self._policies: dict[int, Policy] = {}
        self._held: dict[int, object] = {}
        self._visits: dict[int, int] = {}
        self._ongoing: Ongoing | None = None
        self._moved_on = False
        self._count = 0

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
        clock: Clock | None = None,
    ) -> Call:
        """The call that begins now. conditions: one key for each equal share of `like`'s batch, in row order.

        like: the model's input, (B, ...), for its shape, dtype and device. sigma: the schedule's entry when the host
        knows it, else the model's argument with the dtype it was rounded in. clock: one that was started with the call,
        where that was earlier.
        """
        with self._terms.lock:
            ongoing = self._place(sigma, ROUNDING.get(rounded_in, 0.0), conditions)
            share = like.shape[0] // len(conditions)
            shape = (share, *like.shape[1:])
            rows = []
            for i, condition in enumerate(conditions):
                ongoing.seen.add(condition)
                key = (condition, ongoing.moment.ordinal, shape, like.dtype, like.device)
                lane = self._lanes.setdefault(key, Lane())
                lane.seen = ongoing.moment.index
                rows.append(Row(lane, slice(i * share, (i + 1) * share)))
        call = Call(self._terms, ongoing, rows)
        if not self._followed:
            call.excuse = "no schedule to follow"
        if like.device.type not in TIMED:
            self.report.timed = False
            self.report.note(f"milliseconds on {like.device.type} are of launching the work, not of doing it")
        if clock is None:
            call.clock.start(like.device)
        else:
            call.clock = clock
        return call

    def leave(self, call: Call) -> None:
        """Ends a call that came to its end; one that failed is simply dropped."""
        elapsed = call.clock.stop()
        with self._terms.lock:
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
        if not call.standing_in:  # what is stood in for adds nothing to keep
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
        if before is not None and not self._moved_on and sigma == before.asked and not before.seen & set(conditions):
            # Said before anything is placed: in bf16 two entries may look alike, and the lanes must not part.
            return before
        after = before.entry if before and (self._moved_on or before.seen & set(conditions)) else None
        interval, snapped = self.timeline.place(sigma, tolerance=tolerance, after=after)
        if before is not None and not self._moved_on:
            same_place = interval == before.moment.interval and snapped == before.moment.sigma
            if same_place and not before.seen & set(conditions):
                return before
        self._moved_on = False
        if before is not None and interval < before.moment.interval and self._followed:
            # Time does not run backwards within a run: take it for a run that began anew.
            self.report.note(f"sigma rose from {before.moment.sigma:.4g} to {snapped:.4g}: started afresh")
            self._lanes.clear()
            self._policies.clear()
            self._visits.clear()
        ordinal = self._visits.get(interval, 0)
        self._visits[interval] = ordinal + 1
        moment = Moment(self._count, interval, self.timeline.intervals, snapped, ordinal, self.timeline.before)
        self._count += 1
        self._drop_unseen(moment.index, conditions)
        policy = self._policies.get(ordinal)
        if policy is None:
            policy = self._policies[ordinal] = make_policy(
                self._cache, self.plan.seams, full_first=self.plan.tokens.full_first
            )
        self._ongoing = Ongoing(moment, policy, sigma, entry=interval)
        return self._ongoing

    def _drop_unseen(self, index: int, now: Sequence[Hashable]) -> None:
        """Drops lanes, and the conditions that only they held, that took no part in the latest evaluations."""
        gone = [key for key, lane in self._lanes.items() if lane.seen < index - UNSEEN]
        if not gone:
            return
        self.report.note(
            f"a condition that did not come back within {UNSEEN} evaluations was forgotten; one that is made anew for "
            "each call is never the same, so nothing can be reused for it"
        )
        for key in gone:
            del self._lanes[key]
        alive = {*now, *(key[0] for key in self._lanes)}
        for condition in [held for held in self._held if held not in alive]:
            del self._held[condition]
