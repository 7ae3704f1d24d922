"""parts.py says what a host gives access to inside a block: tracks, what its modules gave out, its tokens' scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Modulation:
    """One track's shift, scale and gates, (B, 1, C) or (1, 1, C). attention: None where one gate is for both."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    attention: Tensor | None

    def of(self, rows: slice) -> Modulation:
        """That of some of the batch."""
        if self.shift.shape[0] == 1:
            return self
        attention = None if self.attention is None else self.attention[rows]
        return Modulation(self.shift[rows], self.scale[rows], self.gate[rows], attention)


class Track(Protocol):
    """One stream of one block, as a host gives access to it. eps: its norm's, which has no weights."""

    stream: str
    eps: float

    def modulation(self) -> Modulation:
        """From this call's vector, by the host's own linear layer."""

    def refresh(self, rows: Tensor, attention: Tensor | None) -> Tensor:
        """The track's output for some tokens, (B, k, C): the host's own MLP on modulated rows.

        attention: the kept attention's output of those tokens, where the last linear layer takes both.
        """


@dataclass(frozen=True)
class Seen:
    """What one track of a full evaluation gave out. span: its tokens within the attention's."""

    attention: Tensor
    output: Tensor
    span: slice


# The host's streams are passed on as they are: Any, for what they are is gate.py's to say.


class Parts(Protocol):
    """One block's parts in one call. grid: the image's tokens as (rows, columns), where the host knows it."""

    grid: tuple[int, int] | None

    @property
    def tracks(self) -> Sequence[Track]:
        """Its streams, in the order of `tensors`."""

    def tensors(self, streams: Any) -> list[Tensor]:
        """Each track's tokens, (B, N, C), in the order of `tracks`."""

    def streams(self, tensors: list[Tensor]) -> Any:
        """The host's streams with those tokens."""

    def seen(self) -> list[Seen] | None:
        """After the block was run: what its modules gave out; None where that could not be seen."""

    def scores(self, kind: str, queries: int) -> Tensor | None:
        """(B, N) over all of the attention's tokens, text first: "attention" received or "value" norm."""
