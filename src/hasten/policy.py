"""policy.py says WHEN to compute. It sees floats, never tensors, so that a recorded run can be replayed.

A policy is asked twice: `forced` before anything is measured (so that a measurement that cannot matter costs
no synchronisation), then `decide` with the measured change. One policy serves one trajectory of one run.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Protocol

from hasten.moment import Moment, Timeline
from hasten.recipe import Cache


class Decision(Enum):
    """What an evaluation does: run the blocks, let remembered deltas stand in, or refresh some tokens."""

    COMPUTE = "compute"
    REUSE = "reuse"
    PARTIAL = "partial"


class Rule(Protocol):
    """One published method's own condition."""

    def reuse(self, moment: Moment, change: float | None, seam: int) -> bool:
        """Whether the remembered delta may stand in."""

    def computed(self, moment: Moment, *, forced: bool) -> None:
        """Told after each evaluation that is computed."""

    def why(self, change: float | None, seam: int) -> str:
        """The reason for the last answer, in a few words."""


class Never:
    """Compute always: no cache, or blocks skipped and nothing else."""

    def reuse(self, moment: Moment, change: float | None, seam: int) -> bool:
        return False

    def computed(self, moment: Moment, *, forced: bool) -> None:
        pass

    def why(self, change: float | None, seam: int) -> str:
        return "no cache"


class Threshold:
    """First-Block and multi-block cache: reuse below a threshold, one for each seam.

    Source: ParaAttention (2024); the per-block form is ComfyUI-Lightning's MBCache.
    """

    def __init__(self, default: float, by_seam: dict[int, float]) -> None:
        self.default, self.by_seam = default, by_seam

    def reuse(self, moment: Moment, change: float | None, seam: int) -> bool:
        return change is not None and change < self._limit(seam)

    def computed(self, moment: Moment, *, forced: bool) -> None:
        pass

    def why(self, change: float | None, seam: int) -> str:
        return f"change {_shown(change)}, threshold {self._limit(seam):g}"

    def _limit(self, seam: int) -> float:
        return self.by_seam.get(seam, self.default)


class Accumulated:
    """TeaCache and EasyCache: reuse until the rescaled changes add up to the threshold.

    Sources: TeaCache (arXiv 2411.19108), a polynomial of each change; EasyCache (arXiv 2507.02860), changes as
    they are (coefficients 1, 0).
    """

    def __init__(self, threshold: float, coefficients: tuple[float, ...]) -> None:
        self.threshold, self.coefficients = threshold, coefficients
        self.total = 0.0

    def reuse(self, moment: Moment, change: float | None, seam: int) -> bool:
        if change is None:
            return False
        rescaled = 0.0
        for coefficient in self.coefficients:
            rescaled = rescaled * change + coefficient
        self.total += rescaled
        return self.total < self.threshold

    def computed(self, moment: Moment, *, forced: bool) -> None:
        self.total = 0.0

    def why(self, change: float | None, seam: int) -> str:
        changes = "changes" if self.coefficients == (1.0, 0.0) else "rescaled changes"
        return f"{changes} add up to {self.total:.3g}, threshold {self.threshold:g}"


class Magnitude:
    """MagCache: reuse while the product of calibrated magnitude ratios stays near 1.

    ratios: mean |delta now| / |delta before| for each step of the whole run it was calibrated on, 1.0 first; for a
    run of another length, or one that begins late, the one at the same share of the way is taken.
    Source: MagCache (arXiv 2506.09045).
    """

    def __init__(self, threshold: float, ratios: tuple[float, ...]) -> None:
        self.threshold, self.ratios = threshold, ratios
        self._restart()

    def reuse(self, moment: Moment, change: float | None, seam: int) -> bool:
        scale = (len(self.ratios) - 1) / max(moment.steps - 1, 1)
        self.product *= self.ratios[min(round(moment.step * scale), len(self.ratios) - 1)]
        self.error += abs(1.0 - self.product)
        return self.error < self.threshold

    def computed(self, moment: Moment, *, forced: bool) -> None:
        self._restart()

    def why(self, change: float | None, seam: int) -> str:
        return f"magnitude error {self.error:.3g}, threshold {self.threshold:g}"

    def _restart(self) -> None:
        self.product, self.error = 1.0, 0.0


class Interval:
    """Compute every n-th interval; n grows by `growth` after each one that was not forced.

    Sources: FORA (arXiv 2407.01425) and TaylorSeer (arXiv 2503.06923) with a fixed n; Spectrum (arXiv 2603.01623)
    with a growing one. A warm-up is `start`.
    """

    def __init__(self, every: int, growth: float) -> None:
        self.window, self.growth = float(every), growth
        self.last: int | None = None

    def reuse(self, moment: Moment, change: float | None, seam: int) -> bool:
        return self.last is not None and moment.interval - self.last < math.floor(self.window)

    def computed(self, moment: Moment, *, forced: bool) -> None:
        self.last = moment.interval
        if not forced:
            self.window += self.growth

    def why(self, change: float | None, seam: int) -> str:
        return f"every {math.floor(self.window)}"


class Listed:
    """Compute exactly the listed steps of the whole schedule; a list for another length keeps its shape."""

    def __init__(self, steps: tuple[int, ...], of: int) -> None:
        self.steps, self.of = frozenset(steps), of
        self.short = False

    def reuse(self, moment: Moment, change: float | None, seam: int) -> bool:
        self.short = moment.steps < SHORT and self.of not in (0, moment.steps)
        return moment.step not in stretched(self.steps, self.of, moment.steps)

    def computed(self, moment: Moment, *, forced: bool) -> None:
        pass

    def why(self, change: float | None, seam: int) -> str:
        if not self.short:
            return "schedule"
        return f"a list of {self.of} steps is followed from {SHORT} steps on (fewer: cache.method interval)"


SHORT = 12


def stretched(steps: frozenset[int], of: int, intervals: int) -> frozenset[int]:
    """The steps of a run of `of` intervals as a run of `intervals` takes them; as they are for of = 0.

    Their places are read off the list as a curve, rank against position, so that steps stand as densely where they
    stood densely. Their number grows with the square root of the run's: a trajectory needs about as many evaluations
    however finely it is cut, so a list of 12 of 28 computes 16 of 50 and 9 of 16. A run shorter than SHORT computes
    everything: its steps are too long to forecast over.
    """
    if of in (0, intervals) or of < 2 or len(steps) < 2:
        return steps
    if intervals < SHORT:
        return frozenset(range(intervals))
    listed = sorted(steps)
    count = min(intervals, max(2, round(len(listed) * math.sqrt(intervals / of))))
    scale, found = (intervals - 1) / (of - 1), [-1]
    for rank in range(count):
        place = round(_between(listed, rank * (len(listed) - 1) / (count - 1)) * scale)
        # Two that are rounded to one place stand side by side, and leave room for those that follow.
        found.append(min(max(place, found[-1] + 1), intervals - count + rank))
    return frozenset(found[1:])


def _between(listed: list[int], place: float) -> float:
    """The list read as a line through its entries, at a fractional index."""
    low = min(int(place), len(listed) - 2)
    return listed[low] + (place - low) * (listed[low + 1] - listed[low])


def planned(cache: Cache, timeline: Timeline) -> list[bool]:
    """For each step of the whole schedule, whether a policy that measures nothing computes it.

    Sigmas before the run's first are not known and taken for high ones.
    """
    policy, steps = make_policy(cache, (0,)), timeline.before + timeline.intervals
    assert not policy.needs_change, "what is measured cannot be foretold"
    found = []
    for step in range(steps):
        sigma = timeline.sigmas[step - timeline.before] if step >= timeline.before else math.inf
        moment = Moment(step, step, steps, sigma)
        forced = policy.forced(moment) is not None
        decision = Decision.COMPUTE if forced else policy.decide(moment, None)
        policy.settled(moment, decision, forced=forced)
        found.append(decision is Decision.COMPUTE)
    return found


class Policy:
    """A rule within the common limits: first and last, start and end, consecutive hits."""

    def __init__(
        self, cache: Cache, rule: Rule, *, needs_change: bool, between: tuple[Decision, ...] = (Decision.REUSE,),
        full_first: int = 0,
    ) -> None:  # fmt: skip
        """between: what evaluations that are not computed do, in turn. full_first: steps that are computed anyhow."""
        self.cache, self.rule, self.needs_change = cache, rule, needs_change
        self.between, self.full_first = between, full_first
        self.hits = 0

    def forced(self, moment: Moment) -> str | None:
        """Why this evaluation must be computed whatever is measured, or None when the rule may choose."""
        cache = self.cache
        if cache.first and moment.index == 0:
            return "first"
        if cache.last and moment.interval == moment.intervals - 1:
            return "last"
        if moment.interval < self.full_first:
            return "warm-up"
        # A step's fraction is where it begins; the slack keeps 0.1 of 30 steps from meaning step 4.
        here = moment.interval / moment.intervals
        if here < cache.start - 1e-9 or (cache.sigma_start is not None and moment.sigma > cache.sigma_start):
            return "before start"
        if here > cache.end + 1e-9 or (cache.sigma_end is not None and moment.sigma < cache.sigma_end):
            return "after end"
        if cache.max_consecutive_hits >= 0 and self.hits >= cache.max_consecutive_hits:
            return "consecutive hits"
        return None

    def decide(self, moment: Moment, change: float | None, seam: int = 0) -> Decision:
        """What to do at this moment, given the measured change at a seam (None: not measured)."""
        if not self.rule.reuse(moment, change, seam):
            return Decision.COMPUTE
        return self.between[self.hits % len(self.between)]

    def settled(self, moment: Moment, decision: Decision, *, forced: bool = False) -> None:
        """Told once for each evaluation what became of it."""
        if decision is not Decision.COMPUTE:
            self.hits += 1
            return
        self.hits = 0
        self.rule.computed(moment, forced=forced)


# What stands between two full evaluations, in turn.
BETWEEN = {
    # ToCa (arXiv 2410.05317); TaylorSeer and FORA forecast every module's output and refresh no token.
    "toca": (Decision.PARTIAL,),
    "modules": (Decision.PARTIAL,),
    # DuCa (arXiv 2412.18911): conservative and aggressive steps take turns, the first after a full one conservative.
    "duca": (Decision.PARTIAL, Decision.REUSE),
}


def make_policy(cache: Cache, seams: tuple[int, ...], *, full_first: int = 0) -> Policy:
    """The policy that `cache` asks for. seams: the plan's, in order; thresholds are given to them one by one.

    full_first: steps at the beginning that methods inside blocks compute in full.
    """
    if cache.method in BETWEEN:
        between = BETWEEN[cache.method]
        rule = Interval(cache.every, cache.growth)
        return Policy(cache, rule, needs_change=False, between=between, full_first=full_first)
    if cache.method in ("fbcache", "mbcache"):
        default = cache.threshold_or_default()
        # Positional over double blocks: a seam stands after the block of its threshold.
        by_seam = {block + 1: limit for block, limit in enumerate(cache.thresholds)}
        return Policy(cache, Threshold(default, by_seam), needs_change=True)
    if cache.method == "teacache":
        return Policy(cache, Accumulated(cache.threshold_or_default(), cache.coefficients), needs_change=True)
    if cache.method == "easycache":
        return Policy(cache, Accumulated(cache.threshold_or_default(), (1.0, 0.0)), needs_change=True)
    if cache.method == "magcache":
        return Policy(cache, Magnitude(cache.threshold_or_default(), cache.ratios), needs_change=False)
    if cache.method == "interval":
        return Policy(cache, Interval(cache.every, cache.growth), needs_change=False)
    if cache.method == "schedule":
        return Policy(cache, Listed(cache.steps, cache.of), needs_change=False)
    return Policy(cache, Never(), needs_change=False)


def _shown(change: float | None) -> str:
    return "unknown" if change is None else f"{change:.3g}"
