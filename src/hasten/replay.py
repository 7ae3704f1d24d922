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
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hasten.capture import obstacle, switches, taking_down

# Sizes whose recordings are kept; the one that was longest not met makes room. Each keeps about what one block needs
# while it runs: some 0.4 GB for FLUX.1-dev at 1024x1024.
SIZES = 3

# Recordings keep their memory, and a decoder still wants some: below this share of the device's nothing is recorded.
ROOM = 1 / 8

# Where there was no room, one call in so many looks again: once or twice in a step of FLUX or Sana.
LOOKS_EVERY = 32

Call = Callable[..., Sequence[Tensor]]


class Recording(Protocol):
    """What a call launches."""

    def record(self, call: Call, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Takes down what `call` launches on those very tensors, without doing it; gives where results will lie.

        The results' memory is kept from other recordings until `release`.
        """

    def replay(self) -> None:
        """Does it, on the current stream; what other recordings of the same place gave out is lost by it."""

    def release(self) -> None:
        """Lets other recordings have the results' memory."""


class CudaRecording:
    """A CUDA graph. Those of one pool share their memory, for one runs at a time."""

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._device, self._pool = device, pool
        self._results: list[Tensor] = []

    def record(self, call: Call, inputs: Sequence[Tensor]) -> list[Tensor]:
        """See Recording."""
        call(*inputs)  # so that nothing is compiled or loaded while launches are taken down
        with taking_down(self._graph, self._device, self._pool):
            self._results = list(call(*inputs))
        return [_unowned(result, self._graph) for result in self._results]

    def replay(self) -> None:
        """See Recording."""
        self._graph.replay()

    def release(self) -> None:
        """See Recording."""
        self._results.clear()


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
        self._make = make or _cuda_recordings
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


def _cuda_recordings(device: torch.device) -> Callable[[], Recording]:
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaRecording(device, pool)


class _Address:
    """Memory as libraries hand it to one another. Source: the CUDA array interface, version 3."""

    def __init__(self, tensor: Tensor, keeper: Any) -> None:
        self.keeper = keeper  # for as long as anyone has the memory
        self.__cuda_array_interface__ = {
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _unowned(tensor: Tensor, keeper: Any) -> Tensor:
    """A tensor's memory under another tensor, which does not keep it allocated: its pool does, with the keeper."""
    if not tensor.is_contiguous():
        raise RuntimeError("a block gives out a tensor that is not contiguous")
    seen = torch.as_tensor(_Address(tensor, keeper), device=tensor.device)
    return seen.view(tensor.dtype).view(tensor.shape)
