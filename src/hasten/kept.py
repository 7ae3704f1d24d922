"""kept.py is how a module's output is kept between full evaluations: as it is, in bf16, in fp8, or on the host.

A tensor that is kept is the lane's own. fp8 has one scale for each token, so that a channel of another size costs only
its own token its digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.kernels.eight_rows import FP8, pack, unpack

# Bytes of one number, where that is not the model's own.
BYTES = {"bf16": 2, "fp8": 1}


@dataclass
class Kept:
    """One module's output, (B, N, C), kept as `memory` has it; dtype and device are those it is given back in.

    slot: its place among the outputs of one module, which stays while newer ones take the memory of older ones.
    """

    memory: str
    dtype: torch.dtype
    device: torch.device
    data: Tensor
    scale: Tensor | None = None
    ready: torch.cuda.Event | None = None
    slot: int = 0

    @classmethod
    def of(cls, tensor: Tensor, memory: str, *, into: Kept | None = None) -> Kept:
        """A copy of `tensor`, in that form. into: one that is not needed any more, whose memory it takes if it can."""
        tensor = tensor.detach()
        if into is not None and into._refill(tensor, memory):
            return into
        if memory == "fp8":
            data = torch.empty(tensor.shape, dtype=FP8, device=tensor.device)
            scale = torch.empty((*tensor.shape[:-1], 1), dtype=torch.float32, device=tensor.device)
            pack(tensor, _flat(data), _flat(scale))
            return cls(memory, tensor.dtype, tensor.device, data, scale)
        if memory == "host":
            data, event = moved_to_cpu(tensor)
            if data.data_ptr() == tensor.data_ptr():  # a model on the CPU
                data = data.clone()
            return cls(memory, tensor.dtype, tensor.device, data, ready=event)
        data = tensor.to(torch.bfloat16 if memory == "bf16" else tensor.dtype, copy=True)
        return cls(memory, tensor.dtype, tensor.device, data.contiguous())

    def _refill(self, tensor: Tensor, memory: str) -> bool:
        alike = (memory, tensor.dtype, tensor.device, tensor.shape)
        if memory == "host" or alike != (self.memory, self.dtype, self.device, self.data.shape):
            return False
        if self.scale is None:
            self.data.copy_(tensor)
        else:
            pack(tensor, _flat(self.data), _flat(self.scale))
        return True

    def read(self) -> Tensor:
        """All of it, in the model's dtype, on its device; not to be written to."""
        if self.scale is not None:
            return unpack(_flat(self.data), _flat(self.scale), self.dtype).view(self.data.shape)
        if self.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(self.ready)
        return self.data.to(self.device, self.dtype, non_blocking=True)

    def rows(self, index: Tensor) -> Tensor:
        """Those rows of it, flattened to (B * N, C): (k, C)."""
        if self.memory == "host":
            return _flat(self.read()).index_select(0, index)
        if self.scale is not None:
            return unpack(_flat(self.data), _flat(self.scale), self.dtype, index)
        return _flat(self.data).index_select(0, index).to(self.dtype)

    def refreshed(self, index: Tensor, rows: Tensor) -> Tensor:
        """All of it with those rows replaced, for now and for later."""
        if self.memory == "host":
            whole = self.read()
            if whole.data_ptr() == self.data.data_ptr():
                _flat(whole).index_copy_(0, index, rows)
                return whole
            _flat(whole).index_copy_(0, index, rows)
            self.data, self.ready = moved_to_cpu(whole)
            return whole
        if self.scale is not None:
            pack(rows, _flat(self.data), _flat(self.scale), index)
        else:
            _flat(self.data).index_copy_(0, index, rows.to(self.data.dtype))
        return self.read()

    def tensors(self) -> list[Tensor]:
        """What it takes memory for."""
        return [self.data] if self.scale is None else [self.data, self.scale]


def moved_to_cpu(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in the CPU's memory, and the event after which it is whole.

    From a GPU into pinned memory, so that the program runs on while it is copied; where none can be had, it waits.
    """
    if tensor.device.type != "cuda":
        return tensor.to("cpu"), None
    try:
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:  # the system's limit of pinned memory
        return tensor.to("cpu"), None
    kept.copy_(tensor, non_blocking=True)
    with torch.cuda.device(tensor.device):
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tensor.device))
    return kept, event


def bytes_of(memory: str, element: int) -> int:
    """Bytes of one kept number, for a model whose numbers take `element` bytes."""
    return BYTES.get(memory, element)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1, tensor.shape[-1])
