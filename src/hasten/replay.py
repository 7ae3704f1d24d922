"""replay.py records what a block launches on a GPU, once for each shape, and replays it: one launch instead of dozens.

Where blocks are small, launching takes longer than computing. A recording reads its weights where they lay when it was
made, so it is given up as soon as any of them lies elsewhere or a part of the block is another one. What comes out is a
tensor of its own, never the recording's memory.
It knows modules and calls, neither families nor hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Call = Callable[..., Any]
SHAPES = 4  # recorded for each module; more run as they are
PLAIN = (int, float, bool, str, type(None))  # what an argument may be beside a tensor


class Recorder(Protocol):
    """Records launches."""

    def suits(self, device: torch.device) -> bool:
        """Whether launches on the device can be recorded now."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does on the same memory what `work` does. Raises RuntimeError where something cannot be recorded."""


class CudaRecorder:
    """CUDA graphs that share a pool of memory: they are replayed one after the other, and nothing lives in between."""

    def __init__(self) -> None:
        self._pool: Any = None

    def suits(self, device: torch.device) -> bool:
        """See Recorder."""
        if device.type != "cuda" or device.index not in (None, torch.cuda.current_device()):
            return False
        return not torch.cuda.is_current_stream_capturing()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See Recorder."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, stream, here = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        here.wait_stream(stream)
        replay: Callable[[], None] = graph.replay
        return replay


class Replay:
    """Recordings of many modules that run one after the other. say: takes remarks."""

    def __init__(self, say: Callable[[str], None], recorder: Recorder | None = None) -> None:
        self.recorder = recorder or CudaRecorder()
        self.recorded = 0
        self._say = say
        self._works = True
        # Every module copies what it is given into the same memory, and out of it again.
        self._memory: dict[Any, Tensor] = {}

    def wrap(self, module: nn.Module, call: Call) -> Call:
        """`call`, which does what `module` does, replayed from its third time on."""
        return _Replayed(self, module, call)

    def memory(self, place: object, like: Tensor) -> Tensor:
        """The memory for tensors of that size and layout at that place, the same for every module."""
        key = place, tuple(like.shape), like.stride(), like.dtype, like.device
        if key not in self._memory:
            self._memory[key] = torch.empty_like(like)
        return self._memory[key]

    def works(self, given: Sequence[Any]) -> bool:
        """Whether a call with these arguments can be recorded."""
        tensors = [value for value in given if isinstance(value, Tensor)]
        if not self._works or torch.is_grad_enabled() or not tensors:
            return False
        if not all(isinstance(value, (Tensor, *PLAIN)) for value in given):
            return False
        return len({tensor.device for tensor in tensors}) == 1 and self.recorder.suits(tensors[0].device)

    def record(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """A recording, or None where it failed; then nothing more is recorded."""
        try:
            replay = self.recorder.record(work)
        except RuntimeError as error:
            self._works = False
            self._say(f"launches cannot be recorded here, blocks run unrecorded ({str(error).splitlines()[0]})")
            return None
        self.recorded += 1
        return replay


class _Replayed:
    """One module's recordings."""

    def __init__(self, owner: Replay, module: nn.Module, call: Call) -> None:
        self.owner, self.module, self.call = owner, module, call
        self._made_of: list[int] = []
        self._times: dict[Any, int] = {}
        self._recordings: dict[Any, tuple[list[Tensor], Callable[[], None], Tensor]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner, given = self.owner, [*args, *kwargs.values()]
        if not owner.works(given):
            return self.call(*args, **kwargs)
        made_of = _made_of(self.module)
        if made_of != self._made_of:
            self._made_of, self._times, self._recordings = made_of, {}, {}
        key = len(args), tuple(kwargs), tuple(_kind(value) for value in given)
        tensors = [value for value in given if isinstance(value, Tensor)]
        found = self._recordings.get(key)
        if found is None:
            times = self._times[key] = self._times.get(key, 0) + 1
            # The first time compiles; the second does on our own memory whatever that still leads to.
            if times == 1 or len(self._recordings) >= SHAPES:
                return self.call(*args, **kwargs)
            memory = [owner.memory(i, tensor) for i, tensor in enumerate(tensors)]
            for own, tensor in zip(memory, tensors, strict=True):
                own.copy_(tensor)
            places = iter(memory)
            swapped = [next(places) if isinstance(value, Tensor) else value for value in given]
            args, kwargs = tuple(swapped[: len(args)]), dict(zip(kwargs, swapped[len(args) :], strict=True))
            out = self.call(*args, **kwargs)
            if times == 2 or not isinstance(out, Tensor):
                return out
            last = owner.memory("out", out)

            def work() -> None:
                last.copy_(self.call(*args, **kwargs))

            replay = owner.record(work)
            if replay is not None:
                self._recordings[key] = memory, replay, last
            return out
        memory, replay, last = found
        for own, tensor in zip(memory, tensors, strict=True):
            own.copy_(tensor)
        replay()
        return last.clone()


def _kind(value: Any) -> object:
    """What of an argument a recording is made for: a tensor's size, layout and dtype, anything else as it is."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    return type(value), value


def _made_of(module: nn.Module) -> list[int]:
    """The module's parts, their attention processors, and where their weights lie."""
    found = []
    for part in module.modules():
        found.append(id(part))
        found.append(id(part.__dict__.get("processor")))
        found += [tensor.data_ptr() for tensor in part._parameters.values() if tensor is not None]
        found += [tensor.data_ptr() for tensor in part._buffers.values() if tensor is not None]
    return found
