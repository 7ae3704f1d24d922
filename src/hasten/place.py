"""place.py keeps one size's recordings: where they read, what lies there, and who still has what they gave out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from hasten.recording import Call, Recording


class Recorded:
    """A recording with what it stands on, where it reads and where it writes. counts: what one run adds to a count."""

    def __init__(
        self, recording: Recording, marks: Hashable, inputs: list[Tensor], results: list[Tensor], counts: dict[str, int]
    ) -> None:
        self.recording, self.marks = recording, marks
        self.inputs, self.results, self.counts = inputs, results, counts
        self.at_rest = {_storage(result): (result, _sharing(_storage(result))) for result in results}


class Place:
    """All recordings of one size: where they read, and what is known to lie there."""

    def __init__(self, make: Callable[[], Recording], *, lends: bool = True) -> None:
        self.make = make
        self.met: dict[Hashable, Hashable] = {}
        self.recorded: dict[Hashable, Recorded] = {}
        self.has_room = False
        self.until_look = 0
        self.lends = lends
        # What was lent and, when last looked at, not given back, by its storage; with how many have that at rest.
        self._lent: dict[int, tuple[Tensor, int]] = {}
        self._own: dict[int, Tensor] = {}
        # By its identity a tensor of ours, whose copy lies there, and at which version. What passes is gone with the
        # next replay.
        self._lies: dict[int, tuple[Tensor, weakref.ref[Tensor], int]] = {}
        self._passing: list[int] = []
        self._newest: Recorded | None = None

    def record(
        self, block: Hashable, marks: Hashable, given: Sequence[Tensor], call: Call, counts: dict[str, int]
    ) -> Recorded:
        """Records a call whose inputs are `given`."""
        # Only what the newest recording gave out is still kept from the next one's intermediate results.
        held = [] if self._newest is None else self._newest.results
        inputs = []
        for position, tensor in enumerate(given):
            there = next((t for t in (*held, *self._own.values()) if self._holds(t, tensor)), None)
            inputs.append(self._own_place(position, tensor) if there is None else there)
        self._bring(inputs, given)
        before = dict(counts)
        recording = self.make()
        try:
            results = recording.record(call, inputs)
        finally:  # the call ran twice, and for nobody
            told = {name: (n - before.get(name, 0)) // 2 for name, n in counts.items()}
            counts.clear()
            counts.update(before)
        done = Recorded(recording, marks, inputs, results, {name: n for name, n in told.items() if n})
        if self._newest is not None:
            self._newest.recording.release()
        self._newest = self.recorded[block] = done
        return done

    def replay(self, done: Recorded, given: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The recorded call's results for other inputs of the same shapes; None while others keep what was lent."""
        if self._lent and self._kept(done.inputs, given):
            return None
        self._bring(done.inputs, given)
        done.recording.replay()
        for place in self._passing:
            self._lies.pop(place, None)
        self._passing.clear()
        if self.lends:
            self._lent |= done.at_rest
            return tuple(result.detach() for result in done.results)
        out = tuple(result.clone() for result in done.results)
        self._passing = [id(result) for result in done.results]
        for result, own in zip(done.results, out, strict=True):
            self._lies[id(result)] = result, weakref.ref(own), _version(own)
        return out

    def _kept(self, places: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
        """Whether anyone has lent memory that this replay might write over: all of it but where its own inputs lie."""
        spared = [_storage(tensor) for place, tensor in zip(places, given, strict=True) if _same(place, tensor)]
        kept = False
        for storage, (_, at_rest) in list(self._lent.items()):
            more = _sharing(storage) - at_rest
            kept = kept or (more > 0 and storage not in spared)
            if more == 0:
                del self._lent[storage]
        return kept

    def _own_place(self, position: int, tensor: Tensor) -> Tensor:
        if position not in self._own:
            self._own[position] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return self._own[position]

    def _bring(self, places: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        """Copies what does not lie in its place yet."""
        for place, tensor in zip(places, given, strict=True):
            if not self._holds(place, tensor):
                place.copy_(tensor)
                self._lies[id(place)] = place, weakref.ref(tensor), _version(tensor)
                if id(place) not in map(id, self._own.values()):
                    self._passing.append(id(place))

    def _holds(self, place: Tensor, tensor: Tensor) -> bool:
        if _same(place, tensor):
            return True
        found = self._lies.get(id(place))
        return found is not None and found[0] is place and found[1]() is tensor and found[2] == _version(tensor) >= 0


def _storage(tensor: Tensor) -> int:
    """The tensor's memory as torch knows it, whichever tensor stands for it."""
    found: int = tensor.untyped_storage()._cdata
    return found


def _sharing(storage: int) -> int:
    """How many have it: tensors, views of them, and what keeps it alive for itself."""
    found: int = torch._C._storage_Use_Count(storage)
    return found


def _same(place: Tensor, tensor: Tensor) -> bool:
    """Whether the tensor is that very memory, laid out just so."""
    return (
        tensor.data_ptr() == place.data_ptr()
        and tensor.dtype == place.dtype
        and tensor.shape == place.shape
        and tensor.stride() == place.stride()
        and _storage(tensor) == _storage(place)
    )


def _version(tensor: Tensor) -> int:
    """Counts writes into the tensor; -1 where torch does not (inference mode)."""
    return -1 if tensor.is_inference() else tensor._version
