"""token_gate.py is the gate of caches that reach inside the blocks: full, in part, or (DuCa) not at all.

A full evaluation is remembered module by module; what is done with it in between is in_part.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hasten.call import Call
from hasten.in_part import ahead, in_part
from hasten.inside import Inside
from hasten.kept import bytes_of
from hasten.parts import Parts, Track
from hasten.policy import Decision
from hasten.tokens import with_spatial_bonus
from hasten.walk import Walk

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
                call.ahead = ahead(call, walk())
        if call.standing_in:
            return replace(call.stand_in()) if block == plan.end else streams
        if call.ahead is not None:
            if block != plan.end:
                return streams
            after = parts.streams(call.ahead)
        elif block in plan.skip:
            after = streams
        else:
            found = in_part(call, block, parts, parts.tensors(streams)) if call.refreshing else None
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
