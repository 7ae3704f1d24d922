"""recording.py takes down what a call launches as a CUDA graph, with its results' memory left to the graph's pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hasten.capture import taking_down

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


def cuda_recordings(device: torch.device) -> Callable[[], Recording]:
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
