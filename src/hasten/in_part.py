"""in_part.py is what a partial evaluation does in a block: modulation, the MLP on the chosen tokens, one dense pass.

Attention is not run; what it gave out at the last full evaluation is added again under the step's own gates.
Sources: ToCa (arXiv 2410.05317), DuCa (2412.18911), TaylorSeer (2503.06923), FORA (2407.01425).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.call import Call
from hasten.inside import Redraw, Remembered, by_slot
from hasten.kernels.chosen_rows import chosen_rows
from hasten.kernels.gated_forecast import TERMS, gated_forecast
from hasten.kernels.gated_sum import gated_sum
from hasten.lane import Row
from hasten.parts import Modulation, Parts, Track
from hasten.walk import Walk, through, walked


def ahead(call: Call, walk: Walk | None) -> list[Tensor] | None:
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


def in_part(call: Call, block: int, parts: Parts, tensors: list[Tensor]) -> list[Tensor] | None:
    """Each track's tokens after the block, or None where what is remembered is of other tokens."""
    if not fits(call, block, parts, tensors):
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
    return refreshed(call, block, parts, tensors)


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


def redrawing(call: Call) -> Redraw:
    """Random scores at each evaluation, where they are asked for: DuCa (arXiv 2412.18911) found them as good as any."""
    if call.plan.tokens.score != "random":
        return None
    seed = call.plan.tokens.seed + call.ongoing.moment.index

    def draw(scores: Tensor) -> Tensor:
        generator = torch.Generator(scores.device).manual_seed(seed)
        return torch.rand(scores.shape, generator=generator, device=scores.device)

    return draw
