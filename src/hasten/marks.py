"""marks.py is what recordings compare to know whether they still stand for a call: things that lie somewhere.

A recording reads memory at its address, so what it is marked with also keeps that memory alive.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


class Itself:
    """Equal where the very same object is held. It is held: an id alone may be the next object's once this is gone."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return type(other) is Itself and other.held is self.held

    def __hash__(self) -> int:
        return id(self.held)


class Numbers:
    """Small tensors, equal where their numbers are. Kept for each device that asks, for as long as this is held."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._on: dict[torch.device, tuple[Tensor, ...]] = {tensors[0].device: tensors}

    def at(self, device: torch.device) -> tuple[Tensor, ...]:
        """They on that device."""
        if device not in self._on:
            self._on[device] = tuple(tensor.to(device) for tensor in self._tensors)
        return self._on[device]

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is Numbers and self._words == other._words)

    def __hash__(self) -> int:
        return hash(self._words)

    @functools.cached_property
    def _words(self) -> tuple[object, ...]:
        return tuple((t.dtype, tuple(t.shape), tuple(t.flatten().tolist())) for t in self._tensors)
