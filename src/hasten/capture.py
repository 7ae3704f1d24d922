"""capture.py takes down launches as a CUDA graph, on a stream that each device keeps for that.

It needs torch's own allocator, which keeps what a graph allocates in a pool of its own. Under cudaMallocAsync, which
ComfyUI chooses by default, an allocation is a step of the graph, and its memory is not there yet while launches are
taken down: Triton refuses to launch on it, and torch ends the process where a capture fails (torch 2.11, Triton 3.6).
What torch launches also depends on switches of the process; a recording stands for those it was made under.
"""

from __future__ import annotations

import functools
import gc
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


def switches() -> Hashable:
    """Torch's global switches that decide which kernels are launched: attention's kinds, precisions, determinism.

    Asked before each replay: less than a microsecond in all.
    """
    return tuple(ask() for ask in _switches())


@functools.cache
def _switches() -> tuple[Callable[[], Any], ...]:
    c: Any = torch._C
    kinds = [getattr(c, f"_get_{kind}_sdp_enabled") for kind in ("flash", "mem_efficient", "math", "cudnn")]
    # From 2.9 on torch refuses to give the one word for TF32 where its newer settings were used.
    precision = getattr(c, "_get_fp32_precision_getter", None)
    if precision is None:
        kinds += [c._get_cublas_allow_tf32, c._get_cudnn_allow_tf32]
    else:
        kinds += [functools.partial(precision, "cuda", what) for what in ("matmul", "conv")]
    order = getattr(c, "_get_sdp_priority_order", None)
    # ComfyUI's --fast sets it; torch has it from 2.7 on.
    sums = getattr(c, "_get_cublas_allow_fp16_accumulation", None)
    return (
        *kinds,
        *([] if sums is None else [sums]),
        *([] if order is None else [lambda: tuple(order())]),
        c._get_cublas_allow_fp16_reduced_precision_reduction,
        c._get_cublas_allow_bf16_reduced_precision_reduction,
        c._get_deterministic_algorithms,
        c._get_cudnn_enabled,
        c._get_cudnn_deterministic,
        c._get_cudnn_benchmark,
    )


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's cyclic collector stays away: it may free somebody's graph or tensor, and no pool may be unmapped then.

    Collecting beforehand, as torch.cuda.graph does, takes longer than all of a block's launches. Where several threads
    take down at once, on a device each, it comes back when the last one is done.
    """
    _COLLECTOR.send_away()
    try:
        yield
    finally:
        _COLLECTOR.let_back()


class _Collector:
    """The process's one cyclic collector, and how many threads want it away."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanting, self._collects = 0, False

    def send_away(self) -> None:
        with self._lock:
            if not self._wanting:
                self._collects = gc.isenabled()
                gc.disable()
            self._wanting += 1

    def let_back(self) -> None:
        with self._lock:
            self._wanting -= 1
            if not self._wanting and self._collects:
                gc.enable()


_COLLECTOR = _Collector()  # one, as Python's own is


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
                with without_collector():
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
        self._state, self._switches = state, switches()
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
            and switches() == self._switches
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
