"""token_gate.py is the gate of caches that reach inside the blocks: full, in part, or (DuCa) not at all.

In part, nothing runs in a block but its modulation, the MLP on the chosen tokens, and one dense pass that adds what is
remembered under fresh gates. Attention is not run; what it gave out at the last full evaluation is added again.
Sources: ToCa (arXiv 2410.05317), DuCa (2412.18911), TaylorSeer (2503.06923), FORA (2407.01425).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.call import Call
from hasten.inside import Inside, Redraw, Remembered, by_slot
from hasten.kept import bytes_of
from hasten.kernels.chosen_rows import chosen_rows
from hasten.kernels.gated_forecast import TERMS, gated_forecast
from hasten.kernels.gated_sum import gated_sum
from hasten.lane import Row
from hasten.parts import Modulation, Parts, Track
from hasten.policy import Decision
from hasten.tokens import with_spatial_bonus
from hasten.walk import Walk, through, walked

_log = logging.getLogger("hasten")


class TokenGate:
    """One block's gate."""

    def __init__(self, block: int) -> None:
        self.block = block

    def __call__(
        self,
        call: Call,
        streams: Any,
        parts: Parts,
        run: Callable[[], Any],
        replace: Callable[[Tensor], Any],
        walk: Callable[[], Walk | None],
    ) -> Any:
        """The block's streams after it: run, in part, or passed through. As in Gate, but for `parts` and `walk`."""
        plan, block = call.plan, self.block
        if block == 0:
            self._begin(call, streams, parts)
            if call.refreshing:
                call.ahead = self._ahead(call, walk())
        if call.standing_in:
            return replace(call.stand_in()) if block == plan.end else streams
        if call.ahead is not None:
            if block != plan.end:
                return streams
            after = parts.streams(call.ahead)
        elif block in plan.skip:
            after = streams
        else:
            found = self._in_part(call, parts, parts.tensors(streams)) if call.refreshing else None
            after = self._in_full(call, parts, run) if found is None else parts.streams(found)
        if block == plan.end and plan.seams:
            call.finish(after.image)
        return after

    def _begin(self, call: Call, streams: Any, parts: Parts) -> None:
        """Takes the evaluation's decision, or follows it."""
        ongoing, policy, terms = call.ongoing, call.ongoing.policy, call.terms
        fresh = False
        for row in call.rows:
            if row.lane.inside is None:
                row.lane.inside = Inside()
            fresh = fresh or not row.lane.inside.tracks
            if call.plan.seams:
                fresh = row.lane.at(0).forget_unlike(streams.image) or fresh
        plan_memory(call, parts.tensors(streams))
        if call.plan.seams:
            call.keep_seam(0, streams.image)
        with terms.lock:
            if ongoing.decision is None:
                reason = policy.forced(ongoing.moment) or ("fresh lane" if fresh else call.excuse or None)
                if reason is not None:
                    call.settle(Decision.COMPUTE, reason=reason, forced=True)
                else:
                    decision = policy.decide(ongoing.moment, None)
                    call.settle(decision, reason=policy.rule.why(None, 0))
        if ongoing.decision is not Decision.COMPUTE and (fresh or call.excuse):
            terms.report.note("a lane without history computed while another reused")
            return
        call.refreshing = ongoing.decision is Decision.PARTIAL
        call.standing_in = ongoing.decision is Decision.REUSE

    def _in_full(self, call: Call, parts: Parts, run: Callable[[], Any]) -> Any:
        """Runs the block, and remembers what its modules gave out."""
        after = run()
        seen, plan, terms = parts.seen(), call.plan, call.terms
        if seen is None:
            terms.report.note(
                "blocks that do not show their parts (fused layers, another attention processor) were computed in full"
            )
            return after
        refreshes = plan.ratios[self.block] > 0.0
        score = self._score(parts, plan.tokens.score, plan.tokens.queries) if refreshes else None
        for row in call.rows:
            inside = row.lane.inside
            assert inside is not None
            for track, part in zip(parts.tracks, seen, strict=True):
                own = len(parts.tracks) > 1  # its attention's output is added by itself
                inside.at(self.block, track.stream).remember(
                    call.ongoing.moment.sigma,
                    part.attention[row.rows] if own or refreshes else None,
                    part.output[row.rows],
                    window=terms.predictor.window,
                    memory="host" if terms.cache.device == "cpu" else plan.tokens.memory,
                    forecast=own,
                )
                if refreshes:
                    mine = torch.zeros(part.output[row.rows].shape[:2], device=part.output.device)
                    if score is not None:
                        mine = self._spread(call, parts, track, score[row.rows, part.span])
                    inside.score(self.block, track.stream, mine)
        return after

    def _score(self, parts: Parts, kind: str, queries: int) -> Tensor | None:
        return parts.scores(kind, queries) if kind in ("attention", "value") else None

    def _spread(self, call: Call, parts: Parts, track: Track, score: Tensor) -> Tensor:
        tokens, grid = call.plan.tokens, parts.grid
        if tokens.spatial == 0.0 or grid is None or track.stream == "text":
            return score
        first = score.shape[1] - grid[0] * grid[1] if track.stream == "joint" else 0
        return with_spatial_bonus(score, grid, bonus=tokens.spatial, cell=tokens.cell, first=first)

    def _ahead(self, call: Call, walk: Walk | None) -> list[Tensor] | None:
        """The tokens after the last block, where all of them can be walked through from here."""
        if walk is None:
            return None
        tokens = call.plan.tokens
        for row in call.rows:
            assert row.lane.inside is not None
            row.lane.inside.arrange(call.plan.ratios, redrawing(call))
            row.lane.inside.weigh(call.terms.predictor, call.ongoing.moment)

        def fitting() -> bool:
            found = []

            def look(block: int, part: Parts, tensors: list[Tensor]) -> list[Tensor]:
                found.append(block in call.plan.skip or fits(call, block, part, tensors))
                return tensors

            through(walk.parts(walk.given), walk.streams(walk.given), look)
            return all(found)

        def run(given: Sequence[Tensor]) -> list[Tensor]:
            for row in call.rows:
                assert row.lane.inside is not None
                row.lane.inside.pick(staleness=tokens.staleness, every=call.terms.cache.every)
            return through(
                walk.parts(given),
                walk.streams(given),
                lambda block, part, x: x if block in call.plan.skip else refreshed(call, block, part, x),
            )

        return walked(call, walk, fitting, run)

    def _in_part(self, call: Call, parts: Parts, tensors: list[Tensor]) -> list[Tensor] | None:
        """Each track's tokens after the block, or None where what is remembered is of other tokens."""
        if not fits(call, self.block, parts, tensors):
            call.terms.report.note("blocks of which nothing is remembered that fits were computed in full")
            return None
        tokens = call.plan.tokens
        for row in call.rows:
            assert row.lane.inside is not None
            row.lane.inside.weigh(call.terms.predictor, call.ongoing.moment)
            row.lane.inside.choose(
                call.ongoing.moment,
                call.plan.ratios,
                staleness=tokens.staleness,
                every=call.terms.cache.every,
                redraw=redrawing(call),
            )
        return refreshed(call, self.block, parts, tensors)


def fits(call: Call, block: int, parts: Parts, tensors: list[Tensor]) -> bool:
    """Whether every lane remembers something of each track, of as many tokens as it has now."""
    for row in call.rows:
        inside = row.lane.inside
        assert inside is not None
        for track, x in zip(parts.tracks, tensors, strict=True):
            if not inside.at(block, track.stream).fits(x[row.rows]):
                return False
    return True


def refreshed(call: Call, block: int, parts: Parts, tensors: list[Tensor]) -> list[Tensor]:
    """Each track's tokens after the block: the chosen ones sent through its MLP, the rest as remembered."""
    after = []
    for track, x in zip(parts.tracks, tensors, strict=True):
        modulation = track.modulation()
        each = [_track(call, row, block, track, x[row.rows], modulation.of(row.rows)) for row in call.rows]
        after.append(each[0] if len(each) == 1 else torch.cat(each))
    return after


def _track(call: Call, row: Row, block: int, track: Track, x: Tensor, m: Modulation) -> Tensor:
    """One lane's tokens of one track after the block, (B, N, C)."""
    inside, predictor, moment = row.lane.inside, call.terms.predictor, call.ongoing.moment
    assert inside is not None
    known: Remembered = inside.at(block, track.stream)
    index = inside.chosen.get((block, track.stream))
    if index is None and 1 < len(known.output) <= TERMS:
        terms, weights = [kept.read() for kept in by_slot(known.output)], inside.weights_of(known)
        if m.attention is None:
            return gated_forecast(x, weights, m.gate, terms, None, ())
        first = [kept.read() for kept in by_slot(known.attention)]
        return gated_forecast(x, weights, m.attention, first, m.gate, terms)
    attention = known.forecast(known.attention, predictor, moment) if m.attention is not None else None
    if index is None:
        output = known.forecast(known.output, predictor, moment)
    else:
        x = x.contiguous()
        rows = chosen_rows(x, index, m.scale, m.shift, eps=track.eps, gate=m.attention, a=attention)
        taken = None if attention is not None else known.attention[-1].rows(index).view(rows.shape)
        fresh = track.refresh(rows, taken).reshape(-1, x.shape[-1])
        if len(known.output) == 1:
            output = known.output[-1].refreshed(index, fresh)
        else:  # a row that is fresh now has no past to be forecast from: it serves this evaluation alone
            output = known.forecast(known.output, predictor, moment).clone()
            output.view(-1, x.shape[-1]).index_copy_(0, index, fresh)
    if attention is None:
        return gated_sum(x, m.gate, output)
    assert m.attention is not None
    return gated_sum(x, m.attention, attention, m.gate, output)


def plan_memory(call: Call, tensors: list[Tensor]) -> None:
    """Adds to the report what each new lane will come to keep, before it does. tensors: block 0's tracks."""
    plan, terms = call.plan, call.terms
    image, text = tensors[0], tensors[-1]
    numbers = (image.numel() + text.numel()) // len(call.rows)
    doubles = plan.doubles
    window = terms.predictor.window
    held = 1 if plan.refreshes else 0
    kept = doubles * 2 * window + (len(plan.ratios) - doubles) * (window + held)
    each = bytes_of(plan.tokens.memory, image.element_size())
    seam = image.numel() // len(call.rows) * image.element_size() * len(plan.seams)
    for row in call.rows:
        if not row.lane.planned:
            row.lane.planned = True
            planned = (numbers * kept * each + seam) / 2**20
            terms.report.cache_mib_planned += planned
            _log.info("what is remembered inside the blocks will take %.0f MiB for this condition", planned)


def redrawing(call: Call) -> Redraw:
    """Random scores at each evaluation, where they are asked for: DuCa (arXiv 2412.18911) found them as good as any."""
    if call.plan.tokens.score != "random":
        return None
    seed = call.plan.tokens.seed + call.ongoing.moment.index

    def draw(scores: Tensor) -> Tensor:
        generator = torch.Generator(scores.device).manual_seed(seed)
        return torch.rand(scores.shape, generator=generator, device=scores.device)

    return draw
