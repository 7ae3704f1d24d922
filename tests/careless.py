"""A recorder without a GPU, as careless with memory as a pool of CUDA graphs is allowed to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Careless:
    """Replays by calling again on the recorded tensors; spoils every other result whose memory it may have had."""

    at_work = False  # a replay launches what was recorded: no Python of the call is run

    def __init__(self, everyone: list[Careless], pool: list[Careless] | None = None) -> None:
        """everyone: takes each that records. pool: those that share memory, all of them if left out."""
        self.all = everyone if pool is None else pool
        self.everyone = everyone
        self.results: list[Tensor] = []
        self.released = False
        self.replays = 0

    def record(self, call: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
        """See hasten.recording.Recording."""
        call(*inputs)
        self.call, self.inputs = call, list(inputs)
        self.results = [torch.full_like(t, float("nan")) for t in call(*inputs)]
        # What was released before this one was made may be where its intermediate results lie.
        self.mine = [t for other in self.all if other.released for t in other.results]
        self.everyone.append(self)
        if self.all is not self.everyone:
            self.all.append(self)
        return self.results

    def release(self) -> None:
        """See hasten.recording.Recording."""
        self.released = True

    def replay(self) -> None:
        """See hasten.recording.Recording."""
        self.replays += 1
        for tensor in self.mine:
            tensor.fill_(float("nan"))
        Careless.at_work = True
        found = [t.clone() for t in self.call(*self.inputs)]
        Careless.at_work = False
        for other in self.all:
            for tensor in other.results:
                if not any(tensor is read for read in self.inputs):  # they were held while this one was recorded
                    tensor.fill_(float("nan"))
        for result, value in zip(self.results, found, strict=True):
            result.copy_(value)


def pools(everyone: list[Careless]) -> Callable[[torch.device], Callable[[], Careless]]:
    """What Replays take as `make`: recordings of one size share their memory."""

    def make(device: torch.device) -> Callable[[], Careless]:
        pool: list[Careless] = []
        return lambda: Careless(everyone, pool)

    return make
