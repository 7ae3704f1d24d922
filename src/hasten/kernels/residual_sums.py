"""The residual signal's change in one pass: sum |(image - entry) - before| over sum |before|, by Triton on a GPU.

Torch's own operations make four intermediate tensors of it. Sums are taken part by part in an order that does not
change, so the same tensors give the same number.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from hasten.kernels.on_device import on_device

BLOCK = 4096
# So many programs share the work: some eight for each multiprocessor of the largest GPUs, and one reads their sums.
PROGRAMS = 1024


def residual_sums(image: Tensor, entry: Tensor, before: Tensor, to_previous: bool) -> Tensor | None:
    """The change as a 0-dim float32 tensor: 0 where nothing moved, else relative to `before` or to image - entry.

    image, entry, before: (B, N, C) of one dtype on one GPU; differences are rounded to that dtype. None where Triton is
    missing or refuses.
    """
    kernels = triton_kernels()
    like = image.shape == entry.shape == before.shape and image.dtype == entry.dtype == before.dtype
    if kernels is None or not like or not image.numel():
        return None
    try:
        with on_device(image.device):  # Triton launches on the current device
            return launch(kernels, image, entry, before, to_previous)
    except Exception as error:  # no C compiler, an old GPU, ...: Triton has no common class for its refusals
        _tell_once(f"{type(error).__name__}: {error}".splitlines()[0])
        return None


@functools.cache
def _tell_once(reason: str) -> None:
    logging.getLogger("hasten").warning("Triton cannot be used here, torch measures changes instead (%s)", reason)


def launch(kernels: Any, image: Tensor, entry: Tensor, before: Tensor, to_previous: bool) -> Tensor:
    """The kernel, whose programs share the work; the last of them adds up."""
    image, entry, before = (t.contiguous() for t in (image, entry, before))
    count = image.numel()
    programs = min(PROGRAMS, -(-count // BLOCK))
    rounds = -(-count // (programs * BLOCK))
    room = torch.empty(2 * PROGRAMS + 1, dtype=torch.float32, device=image.device)
    change = room[-1]
    kernels.change_of[(programs,)](
        *(image, entry, before, room, change, _arrived(image.device, _stream(image.device)), count, rounds),
        PREVIOUS=to_previous,
        PROGRAMS=PROGRAMS,
        BLOCK=BLOCK,
    )
    return change


@functools.cache
def _arrived(device: torch.device, stream: int) -> Tensor:
    """A count that each launch leaves at 0, one for each stream: on another a launch may be under way."""
    return torch.zeros((), dtype=torch.int32, device=device)


def _stream(device: torch.device) -> int:
    """The current one's address."""
    if device.type != "cuda":
        return 0
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream


@functools.cache
def triton_kernels() -> Any:
    """The module of kernels, compiled on first launch; None where Triton is missing."""
    try:
        from hasten.kernels import residual_triton
    except ImportError:
        return None
    return residual_triton
