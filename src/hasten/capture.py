"""capture.py takes down launches as a CUDA graph, on a stream that each device keeps for that.

It needs torch's own allocator, which keeps what a graph allocates in a pool of its own. Under cudaMallocAsync, which
ComfyUI chooses by default, an allocation is a step of the graph, and its memory is not there yet while launches are
taken down: Triton refuses to launch on it, and torch ends the process where a capture fails (torch 2.11, Triton 3.6).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Run = Callable[[Sequence[Tensor]], list[Tensor]]


def obstacle() -> str | None:
    """Why no launch on a GPU can be recorded in this process; None where it can be."""
    backend = torch.cuda.get_allocator_backend()
    if backend == "native":
        return None
    return f"recordings need torch's own allocator, this is {backend} (in ComfyUI: start it with --disable-cuda-malloc)"


@contextmanager
def taking_down(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None) -> Iterator[None]:
    """What is launched meanwhile is not done but taken down in `graph`. Raises what torch does where it cannot be.

    pool: the memory of other graphs, for those that never run at the same time.
    """
    with torch.cuda.device(device):
        stream, one_at_a_time = _beside(torch.cuda.current_device())
        with one_at_a_time:
            current = torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                _take_workspaces(device)
                # Other threads may go on with the device: another model, a preview.
                if pool is None:
                    graph.capture_begin(capture_error_mode="thread_local")
                else:
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    yield
                finally:
                    graph.capture_end()
            current.wait_stream(stream)


class Recorded:
    """One call as a CUDA graph, with inputs of its own. `fits` says whether it may be played."""

    def __init__(self, run: Run, given: Sequence[Tensor], reads: Sequence[Tensor], state: Hashable) -> None:
        """Records, without running it. reads: tensors whose addresses it takes. Raises what the recording raises."""
        self._state = state
        self._given = [tensor.clone() for tensor in given]
        self._reads = [(tensor, tensor.data_ptr()) for tensor in reads]
        self._graph = torch.cuda.CUDAGraph()
        with taking_down(self._graph, given[0].device):
            self._out = run(self._given)

    def fits(self, given: Sequence[Tensor], reads: Sequence[Tensor], state: Hashable) -> bool:
        """Whether the inputs are of the same kind and everything else lies where it lay."""
        alike = all(_kind(own) == _kind(now) for own, now in zip(self._given, given, strict=True))
        return (
            alike
            and state == self._state
            and len(reads) == len(self._reads)
            and all(now is own and now.data_ptr() == at for now, (own, at) in zip(reads, self._reads, strict=True))
        )

    def play(self, given: Sequence[Tensor]) -> list[Tensor]:
        """What the call gives for those inputs: tensors of the caller's own."""
        for own, now in zip(self._given, given, strict=True):
            own.copy_(now)
        self._graph.replay()
        return [tensor.clone() for tensor in self._out]


@functools.cache
def _beside(device: int) -> tuple[torch.cuda.Stream, threading.Lock]:
    """The device's stream for captures. One, for cuBLAS keeps a workspace of 32 MiB for every stream that it met."""
    return torch.cuda.Stream(device), threading.Lock()


def _take_workspaces(device: torch.device) -> None:
    """Has cuBLAS allocate what it keeps for this stream: within a capture it would hold on to the graph's pool."""
    square = torch.zeros(16, 16, device=device, dtype=torch.float16)
    torch.mm(square, square)
    torch.addmm(square[0], square, square)  # with a bias: cuBLASLt


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device
