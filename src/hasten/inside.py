"""inside.py is what one lane remembers inside the blocks: each module's latest outputs, its tokens' scores and ages.

A *track* is one stream of one block: what runs from a norm through an MLP. In a double block image and text are two
tracks, in a single block their concatenation is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.kept import Kept
from hasten.kernels.weighted_sum import weighted_sum
from hasten.moment import Moment
from hasten.predict import Predictor
from hasten.tokens import choose, fresh_count, normalised


@dataclass
class Remembered:
    """One track: outputs of the latest full evaluations, newest last, before their gates.

    attention: the attention's output; projected where the block adds it by itself, as the last linear layer takes it
    where that takes both. output: the MLP's or the last linear layer's. score: (B, N), normalised. age: (B, N), partial
    evaluations since each token was refreshed.
    """

    sigmas: list[float] = field(default_factory=list)
    attention: list[Kept] = field(default_factory=list)
    output: list[Kept] = field(default_factory=list)
    score: Tensor | None = None
    age: Tensor | None = None

    def remember(
        self, sigma: float, attention: Tensor | None, output: Tensor, *, window: int, memory: str, forecast: bool
    ) -> None:
        """Keeps what a full evaluation gave. forecast: the attention's output is forecast too, not only held."""
        if self.sigmas and self.sigmas[-1] == sigma:
            del self.sigmas[-1:], self.output[-1:], self.attention[-1:]
        if self.output and self.output[-1].data.shape != output.shape:
            # A host's other patches may add or drop tokens within a run: what is of others cannot stand in.
            del self.sigmas[:], self.output[:], self.attention[:]
        # Room first: what is dropped makes place for what comes.
        del self.sigmas[: 1 - window or None], self.output[: 1 - window or None]
        del self.attention[: (1 - window or None) if forecast else None]
        self.sigmas.append(sigma)
        self.output.append(Kept.of(output, memory))
        if attention is not None:
            self.attention.append(Kept.of(attention, memory))

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

    def tensors(self) -> list[Tensor]:
        """Every tensor that is kept here."""
        kept = [t for k in (*self.attention, *self.output) for t in k.tensors()]
        return [*kept, *(t for t in (self.score, self.age) if t is not None)]


@dataclass
class Inside:
    """One lane's tracks by block and stream, and the tokens chosen for the evaluation under way."""

    tracks: dict[tuple[int, str], Remembered] = field(default_factory=dict)
    chosen: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    chosen_for: int = -1

    def at(self, block: int, stream: str) -> Remembered:
        """The track, empty when new."""
        return self.tracks.setdefault((block, stream), Remembered())

    def score(self, block: int, stream: str, score: Tensor) -> None:
        """After a full evaluation: the tokens' scores, (B, N), and no token is stale."""
        track = self.at(block, stream)
        track.score = normalised(score)
        track.age = torch.zeros(score.shape, dtype=torch.int32, device=score.device)

    def choose(
        self,
        moment: Moment,
        ratios: Sequence[float],
        *,
        staleness: float,
        every: int,
        redraw: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Chooses the tokens of every track at once, where that is not done yet: few launches for all blocks.

        redraw: gives other scores for (L, B, N) of them, where they are drawn anew at each evaluation.
        """
        if self.chosen_for == moment.index:
            return
        self.chosen_for, self.chosen = moment.index, {}
        alike: dict[tuple[str, torch.Size], list[int]] = {}
        for (block, stream), track in self.tracks.items():
            if ratios[block] > 0.0 and track.score is not None:
                alike.setdefault((stream, track.score.shape), []).append(block)
        for (stream, shape), blocks in alike.items():
            tracks = [self.tracks[block, stream] for block in blocks]
            scores = torch.stack([t.score for t in tracks if t.score is not None])
            ages = torch.stack([t.age for t in tracks if t.age is not None])
            counts = [fresh_count(ratios[block], shape[-1]) for block in blocks]
            scores = scores if redraw is None else redraw(scores)
            indices, after = choose(scores, ages, counts, staleness=staleness, every=every)
            for block, track, index, age in zip(blocks, tracks, indices, after, strict=True):
                track.age = age
                if len(index):
                    self.chosen[block, stream] = index

    def tensors(self) -> list[Tensor]:
        """Every tensor that is kept here."""
        return [t for track in self.tracks.values() for t in track.tensors()]
