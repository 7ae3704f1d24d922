"""inside.py is what one lane remembers inside the blocks: each module's latest outputs, its tokens' scores and ages.

A *track* is one stream of one block: what runs from a norm through an MLP. In a double block image and text are two
tracks, in a single block their concatenation is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.capture import Recorded
from hasten.kept import Kept
from hasten.kernels.weighted_sum import weighted_sum
from hasten.moment import Moment
from hasten.predict import Predictor
from hasten.tokens import choose, fresh_count, normalised

# Gives other scores for (L, B, N) of them; None where they stay.
Redraw = Callable[[Tensor], Tensor] | None


@dataclass
class Remembered:
    """One track: outputs of the latest full evaluations, newest last, before their gates.

    attention: the attention's output; projected where the block adds it by itself, as the last linear layer takes it
    where that takes both. output: the MLP's or the last linear layer's.
    """

    sigmas: list[float] = field(default_factory=list)
    attention: list[Kept] = field(default_factory=list)
    output: list[Kept] = field(default_factory=list)

    def remember(
        self, sigma: float, attention: Tensor | None, output: Tensor, *, window: int, memory: str, forecast: bool
    ) -> None:
        """Keeps what a full evaluation gave. forecast: the attention's output is forecast too, not only held."""
        again = bool(self.sigmas) and self.sigmas[-1] == sigma
        if self.output and self.output[-1].data.shape != output.shape:
            # A host's other patches may add or drop tokens within a run: what is of others cannot stand in.
            del self.sigmas[:], self.output[:], self.attention[:]
        if again or len(self.sigmas) >= window:
            self.sigmas = self.sigmas[:-1] if again else self.sigmas[1:]
        self.sigmas.append(sigma)
        _put(self.output, output, window=window, memory=memory, again=again)
        if attention is not None:
            _put(self.attention, attention, window=window if forecast else 1, memory=memory, again=again)

    def fits(self, x: Tensor) -> bool:
        """Whether something is remembered, and of as many tokens and samples as x, (B, N, C), has."""
        return bool(self.output) and self.output[-1].data.shape == x.shape

    def forecast(self, kept: Sequence[Kept], predictor: Predictor, moment: Moment) -> Tensor:
        """What stands in for a module's output now, (B, N, C)."""
        weights = predictor.weights(self.sigmas, moment)[-len(kept) :]
        *older, newest = kept
        if not older or not any(weights[:-1]):
            return newest.read()
        terms = [(k, w) for k, w in zip(older, weights, strict=False) if w != 0.0]
        base = newest.read()
        # The newest is the base, so its own weight counts from 1.
        return weighted_sum(base, [*(k.read() for k, _ in terms), base], [*(w for _, w in terms), weights[-1] - 1.0])

    def slots(self) -> tuple[int, ...]:
        """Where each output lies, oldest first."""
        return tuple(kept.slot for kept in self.output)

    def tensors(self) -> list[Tensor]:
        """Every tensor that is kept here, in an order that stays while newer ones take older ones' memory."""
        return [t for k in (*by_slot(self.attention), *by_slot(self.output)) for t in k.tensors()]


def by_slot(kept: Sequence[Kept]) -> list[Kept]:
    """In the order of their memory, not of their age."""
    return sorted(kept, key=lambda each: each.slot)


def _put(kept: list[Kept], tensor: Tensor, *, window: int, memory: str, again: bool) -> None:
    """Keeps a copy as the newest, in the memory of the one that it replaces: addresses stay those of a recording."""
    into, slot = None, len(kept)
    if kept and (again or len(kept) >= window):
        into = kept.pop(-1 if again else 0)
        slot = into.slot
    kept.append(Kept.of(tensor, memory, into=into))
    kept[-1].slot = slot


@dataclass
class Group:
    """Tracks of one stream with equally many tokens: scores, (L, B, N), and ages in partial evaluations since each
    token was refreshed, alike. counts: how many tokens each refreshes; limit: the same, (L, 1, 1)."""

    blocks: list[int]
    counts: list[int]
    scores: Tensor
    ages: Tensor
    limit: Tensor


@dataclass
class Inside:
    """One lane's tracks by block and stream, and the tokens chosen for the evaluation under way.

    histories: what tracks remember, by sigmas and slots, each a row of `weights`, (histories, slots): what a forecast
    takes of every slot in the evaluation under way. walks: through all blocks at once; recorded: one of them, as
    walk.py plays it again.
    """

    tracks: dict[tuple[int, str], Remembered] = field(default_factory=dict)
    groups: dict[tuple[str, torch.Size], Group] = field(default_factory=dict)
    chosen: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    walks: int = 0
    recorded: Recorded | None = None
    histories: dict[tuple[tuple[float, ...], tuple[int, ...]], int] = field(default_factory=dict)
    weights: Tensor | None = None
    _scored: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    _chosen_for: int = -1
    _weighed_for: int = -1

    def at(self, block: int, stream: str) -> Remembered:
        """The track, empty when new."""
        return self.tracks.setdefault((block, stream), Remembered())

    def score(self, block: int, stream: str, score: Tensor) -> None:
        """After a full evaluation: the tokens' scores, (B, N), as they are; none of the tokens is stale."""
        self._scored[block, stream] = score

    def choose(
        self, moment: Moment, ratios: Sequence[float], *, staleness: float, every: int, redraw: Redraw = None
    ) -> None:
        """Chooses the tokens of every track at once, where that is not done yet: few launches for all blocks."""
        if self._chosen_for == moment.index:
            return
        self._chosen_for = moment.index
        self.arrange(ratios, redraw)
        self.pick(staleness=staleness, every=every)

    def arrange(self, ratios: Sequence[float], redraw: Redraw = None) -> None:
        """Gives the scores that came since their places. redraw: other scores for (L, B, N), drawn anew each time."""
        alike: dict[tuple[str, torch.Size], dict[int, Tensor]] = {}
        for (block, stream), score in self._scored.items():
            if ratios[block] > 0.0:
                alike.setdefault((stream, score.shape), {})[block] = score
        self._scored = {}
        for key, found in alike.items():
            scores, group = normalised(torch.stack(list(found.values()))), self.groups.get(key)
            if group is None or not found.keys() <= set(group.blocks):
                counts = [fresh_count(ratios[block], scores.shape[-1]) for block in found]
                limit = torch.tensor(counts, device=scores.device).view(-1, 1, 1)
                ages = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
                self.groups[key] = Group(list(found), counts, scores, ages, limit)
            elif len(found) == len(group.blocks):
                group.scores.copy_(scores)
                group.ages.zero_()
            else:
                for block, score in zip(found, scores, strict=True):
                    group.scores[group.blocks.index(block)] = score
                    group.ages[group.blocks.index(block)] = 0
        if redraw is not None:
            for group in self.groups.values():
                group.scores.copy_(redraw(group.scores))

    def weigh(self, predictor: Predictor, moment: Moment) -> None:
        """Puts this evaluation's weights on the device, in the memory of those before where they are as many."""
        if predictor.window == 1 or self._weighed_for == moment.index:
            return
        self._weighed_for, self.histories = moment.index, {}
        rows: list[list[float]] = []
        for track in self.tracks.values():
            key = tuple(track.sigmas), track.slots()
            if track.output and key not in self.histories:
                self.histories[key] = len(rows)
                weights = dict(zip(key[1], predictor.weights(track.sigmas, moment)[-len(key[1]) :], strict=True))
                rows.append([weights.get(slot, 0.0) for slot in range(predictor.window)])
                device = track.output[-1].device
        if not rows:
            return
        now = torch.tensor(rows, dtype=torch.float32, device=device)
        if self.weights is not None and self.weights.shape == now.shape:
            self.weights.copy_(now)
        else:
            self.weights = now

    def weights_of(self, track: Remembered) -> Tensor:
        """The track's own, one for each slot."""
        assert self.weights is not None
        return self.weights[self.histories[tuple(track.sigmas), track.slots()]]

    def pick(self, *, staleness: float, every: int) -> None:
        """The tokens with the highest scores, and the ages after it. Nothing waits for the device."""
        self.chosen = {}
        for (stream, _), group in self.groups.items():
            indices, after = choose(
                group.scores, group.ages, group.counts, staleness=staleness, every=every, limit=group.limit
            )
            group.ages.copy_(after)
            for block, index in zip(group.blocks, indices, strict=True):
                if len(index):
                    self.chosen[block, stream] = index

    def tensors(self) -> list[Tensor]:
        """Every tensor that is kept here."""
        kept = [t for track in self.tracks.values() for t in track.tensors()]
        kept += [t for group in self.groups.values() for t in (group.scores, group.ages, group.limit)]
        kept += [] if self.weights is None else [self.weights]
        return [*kept, *self._scored.values()]
