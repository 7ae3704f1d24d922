"""replay.py records what a block launches as a CUDA graph, once for each block and size, and replays it from then on.

A block of FLUX.1-dev launches a dozen kernels, and in 8 bits the GPU is done with them sooner than Python is with the
next dozen. It knows calls that take tensors and give tensors, neither families nor hosts: what else a recording stands
on (where the weights lie, which attention) a host hands over as `marks`; other marks, another recording. So are torch's
global switches, which are looked at here.

Inputs are copied to where the recording reads them, unless they are there already: what one block gave out lies where
the next one's recording reads. Results are lent: the memory that the recording wrote, without a copy. Before anything
is replayed over memory that was lent it is looked up whether anyone still has it (how many tensors share it). If so,
that memory is left to them, blocks are recorded anew elsewhere, and from then on results are copies. So nothing that is
kept changes later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from hasten.capture import obstacle, switches
from hasten.place import Place, Recorded
from hasten.recording import Call, Recording, cuda_recordings

# Sizes whose recordings are kept; the one that was longest not met makes room. Each keeps about what one block needs
# while it runs: some 0.4 GB for FLUX.1-dev at 1024x1024.
SIZES = 3

# Recordings keep their memory, and a decoder still wants some: below this share of the device's nothing is recorded.
ROOM = 1 / 8

# Where there was no room, one call in so many looks again: once or twice in a step of FLUX or Sana.
LOOKS_EVERY = 32


class Replays:
    """One model's recordings. say: takes remarks; make: what records, by device.

    lends: whether results are lent as long as nobody keeps one, or copied from the start.

    What cannot be recorded (no CUDA, gradients asked for, a failure) is called as it is, the last with a remark.
    """

    def __init__(
        self,
        *,
        say: Callable[[str], None],
        sizes: int = SIZES,
        lends: bool = True,
        make: Callable[[torch.device], Callable[[], Recording]] | None = None,
    ) -> None:
        self.works = True
        self.bytes = 0
        self._say, self._sizes, self._lends = say, sizes, lends
        self._make = make or cuda_recordings
        self._on_cuda_alone = make is None
        self._places: dict[Hashable, Place] = {}
        self._lock = threading.Lock()
        self._said_full = False

    def run(
        self,
        block: Hashable,
        marks: Hashable,
        given: tuple[Tensor, ...],
        call: Call,
        counts: dict[str, int] | None = None,
    ) -> Sequence[Tensor]:
        """What call(*given) gives: run as it is at a size's first meeting, recorded at the second, replayed from then.

        counts: a count that the call raises, raised by a replay just so.
        """
        if not self.works or not self._fit(given):
            return call(*given)
        with self._lock:
            place = self._place_for(given)
            done = self._found(place, block, marks, given, call, counts)
            out = None if done is None else place.replay(done, given)
            if done is not None and out is None:  # somebody keeps what was lent: that memory is theirs from now on
                place = self._afresh(place, given[0].device)
                done = self._found(place, block, marks, given, call, counts)
                out = None if done is None else place.replay(done, given)
            if done is not None and out is not None:
                if counts is not None:
                    for name, n in done.counts.items():
                        counts[name] = counts.get(name, 0) + n
                return out
        return call(*given)

    def _found(
        self,
        place: Place,
        block: Hashable,
        marks: Hashable,
        given: Sequence[Tensor],
        call: Call,
        counts: dict[str, int] | None,
    ) -> Recorded | None:
        """The call's recording, made now where that is due; None where it is to be called as it is."""
        done = place.recorded.get(block)
        if done is not None and done.marks == marks:
            return done
        if place.met.get(block) != marks:
            place.met[block] = marks
            return None
        if not self._has_room(place, given[0].device):
            return None
        return self._recorded(place, block, marks, given, call, {} if counts is None else counts)

    def _afresh(self, place: Place, device: torch.device) -> Place:
        """Another place for the same size, in memory of its own, whose results are copies."""
        if self._on_cuda_alone:
            torch.cuda.synchronize(device)  # it may be running yet
        size = next(size for size, found in self._places.items() if found is place)
        new = self._places[size] = Place(self._make(device), lends=False)
        new.met = dict(place.met)
        return new

    def drop(self) -> None:
        """Forgets every recording and gives its memory back."""
        with self._lock:  # another thread may be replaying
            self._drop()

    def _drop(self) -> None:
        if self._places and self._on_cuda_alone:
            torch.cuda.synchronize()
        self._places.clear()
        self.bytes = 0

    def _fit(self, given: Sequence[Tensor]) -> bool:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if not self._on_cuda_alone:
            return True
        if not all(tensor.is_cuda for tensor in given):
            return False
        reason = obstacle()
        if reason is not None:
            self.works = False
            self._say(f"blocks are launched kernel by kernel: {reason}")
        return self.works and not torch.is_autocast_enabled("cuda") and not torch.cuda.is_current_stream_capturing()

    def _place_for(self, given: Sequence[Tensor]) -> Place:
        device = given[0].device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        shapes = tuple((t.shape, t.dtype) for t in given)
        size: Hashable = (device, stream, torch.is_inference_mode_enabled(), switches(), shapes)
        place = self._places.pop(size, None)
        if place is None:
            if len(self._places) >= self._sizes:
                if self._on_cuda_alone:
                    torch.cuda.synchronize(device)  # it may be running yet
                del self._places[next(iter(self._places))]
            place = Place(self._make(device), lends=self._lends)
        self._places[size] = place  # the latest at the end
        return place

    def _has_room(self, place: Place, device: torch.device) -> bool:
        """Whether enough of the device's memory is unused.

        Until it is, each size looks again after some calls, of whichever blocks: a text encoder may have gone since.
        """
        place.until_look -= 1
        if place.has_room or place.until_look > 0:
            return place.has_room
        place.until_look = LOOKS_EVERY
        place.has_room = device.type != "cuda" or unused_share(device) >= ROOM
        if not place.has_room and not self._said_full:
            self._said_full = True
            self._say("launches are not recorded while less than an eighth of the GPU's memory is unused")
        return place.has_room

    def _recorded(
        self,
        place: Place,
        block: Hashable,
        marks: Hashable,
        given: Sequence[Tensor],
        call: Call,
        counts: dict[str, int],
    ) -> Recorded | None:
        device = given[0].device
        before = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
        try:
            done = place.record(block, marks, given, call, counts)
        except RuntimeError as error:  # out of memory is one
            self.works = False
            self._drop()
            why = f"{error}".strip().splitlines() or [type(error).__name__]
            self._say(f"launches cannot be recorded here ({why[0][:160]}): blocks are launched kernel by kernel")
            return None
        if device.type == "cuda":
            self.bytes += max(torch.cuda.memory_reserved(device) - before, 0)
        return done


def unused_share(device: torch.device) -> float:
    """What of a GPU's memory nobody uses, torch's own reserve among it."""
    free, total = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / total
