"""diffusers_ahead.py is what of a FLUX's call need not wait, or need not be done again.

The rotation's cosines and sines are made of positions alone, some forty-five launches for tables that are the same at
every step: they are kept while the very same position tensors come. The last layer is launched for the stand-in while
the host still waits for the decision; it counts only if that very tensor arrives there. Both are what the modules
themselves give, so nothing changes but time.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hasten.hosts.diffusers_slot import Slot

# With two prompts pipelines hand over two sets of positions, in turns.
KEPT = 2


class Positions(NamedTuple):
    """Text's and image's position tensors as they were: which tensors, and how often they had been written."""

    tensors: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Positions | None:
        """None where they are missing, or where writes into them are not counted."""
        tensors = [t for t in (given.get("txt_ids"), given.get("img_ids")) if isinstance(t, Tensor)]
        if len(tensors) < 2 or any(tensor.is_inference() for tensor in tensors):
            return None
        return cls(tuple(weakref.ref(t) for t in tensors), tuple(t._version for t in tensors))

    def serve(self, now: Positions) -> bool:
        """Whether these are the very tensors of `now`, unchanged."""
        return self.versions == now.versions and all(
            own() is not None and own() is other() for own, other in zip(self.tensors, now.tensors, strict=True)
        )


class Made(NamedTuple):
    """The last layer's outcome for a stand-in at that version."""

    image: Tensor
    version: int
    vector: Tensor
    normed: Tensor
    out: Tensor

    def of(self, image: Any, vector: Any) -> bool:
        """Whether those are the tensors that it was made of, not written since."""
        return image is self.image and vector is self.vector and self.image._version == self.version


class Ahead:
    """One FLUX transformer's rotation and last layer while a recipe is applied."""

    def __init__(self, transformer: Any) -> None:
        self._rotation = Slot(transformer.pos_embed)
        self._norm, self._project = Slot(transformer.norm_out), Slot(transformer.proj_out)
        self.slots = [self._rotation, self._norm, self._project]
        self._kept: list[tuple[Positions, Any]] = []
        self._now = threading.local()  # calls may come side by side
        self._rotation.take(self._rotated)
        self._norm.take(self._normed)
        self._project.take(self._projected)

    def begin(self, given: Mapping[str, Any]) -> None:
        """A call begins. given: its arguments by name."""
        self._now.positions = Positions.of(given)

    def last_layer(self, image: Tensor, *, vector: Tensor) -> None:
        """Launches it for a stand-in, (B, N, C); vector: the call's time and prompt, (B, C)."""
        if image.is_inference() or any(_hooked(slot.module, image.device) for slot in (self._norm, self._project)):
            return
        normed = self._norm.inner(image, vector)
        self._now.made = Made(image, image._version, vector, normed, self._project.inner(normed))

    def forget(self) -> None:
        """The call is over."""
        self._now.positions = self._now.made = None

    def end(self) -> None:
        """The run is over."""
        self._kept.clear()
        self.forget()

    def _rotated(self, *args: Any, **kwargs: Any) -> Any:
        positions, self._now.positions = getattr(self._now, "positions", None), None
        if positions is None or _heard(self._rotation.module):  # a listener hears every step
            return self._rotation.inner(*args, **kwargs)
        for kept, found in self._kept:
            if kept.serve(positions):
                return found
        found = self._rotation.inner(*args, **kwargs)
        self._kept = [*self._kept[1 - KEPT :], (positions, found)]
        return found

    def _normed(self, *args: Any, **kwargs: Any) -> Any:
        made = getattr(self._now, "made", None)
        if made is not None and not kwargs and len(args) == 2 and made.of(*args):
            return made.normed
        return self._norm.inner(*args, **kwargs)

    def _projected(self, *args: Any, **kwargs: Any) -> Any:
        made = getattr(self._now, "made", None)
        if made is not None and not kwargs and len(args) == 1 and args[0] is made.normed:
            return made.out
        return self._project.inner(*args, **kwargs)


def ahead_for(transformer: nn.Module) -> Ahead | None:
    """For diffusers' own FLUX; None for other families, and for a model of whose forward nothing is known."""
    from diffusers import FluxTransformer2DModel

    if type(transformer).forward is not FluxTransformer2DModel.forward:
        return None
    return Ahead(transformer)


def _hooked(module: nn.Module, device: torch.device) -> bool:
    """Whether anything listens to it or brings its weights (offloading): then it is called in its turn alone."""
    return _heard(module) or _elsewhere(module, device)


# Both are asked at every call: by look-ups, where `modules()` and `parameters()` take five times as long.


def _heard(module: nn.Module) -> bool:
    own = module.__dict__
    if own["_forward_pre_hooks"] or own["_forward_hooks"] or "_hf_hook" in own or "_diffusers_hook" in own:
        return True
    return any(child is not None and _heard(child) for child in own["_modules"].values())


def _elsewhere(module: nn.Module, device: torch.device) -> bool:
    own = module.__dict__
    if any(weight is not None and weight.device != device for weight in own["_parameters"].values()):
        return True
    return any(child is not None and _elsewhere(child, device) for child in own["_modules"].values())
