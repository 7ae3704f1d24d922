"""diffusers_ahead.py is what of a FLUX's call need not wait, or need not be done again.

The rotation's cosines and sines are made of positions alone, some forty-five launches for tables that are the same at
every step: they are kept while the very same position tensors come. So are the guidance's sines, ten launches. The last
layer is launched for the stand-in while the host still waits for the decision; it counts only if that very tensor
arrives there. All of it is what the modules themselves give, so nothing changes but time.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hasten.hosts.diffusers_slot import Slot

# diffusers' module that makes the vector of time, guidance and prompt, the sines of the first two one after the other.
GUIDED = "CombinedTimestepGuidanceTextProjEmbeddings"

# With two prompts pipelines hand over two sets of positions, in turns.
KEPT = 2


class Inputs(NamedTuple):
    """Some tensors as they were: which ones, and how often they had been written.

    A write that torch does not count, through `.numpy()` or `.data`, is not seen: hand over another tensor then.
    """

    tensors: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, *given: Any) -> Inputs | None:
        """None where one is missing, or where writes into it are not counted."""
        if not all(isinstance(tensor, Tensor) and not tensor.is_inference() for tensor in given):
            return None
        return cls(tuple(weakref.ref(tensor) for tensor in given), tuple(tensor._version for tensor in given))

    def serve(self, now: Inputs) -> bool:
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
    """One FLUX transformer's rotation, guidance and last layer while a recipe is applied."""

    def __init__(self, transformer: Any) -> None:
        self._rotation = Slot(transformer.pos_embed)
        self._norm, self._project = Slot(transformer.norm_out), Slot(transformer.proj_out)
        self.slots = [self._rotation, self._norm, self._project]
        self._kept: list[tuple[Inputs, Any]] = []
        self._vector = transformer.time_text_embed
        self._waves: Slot | None = None
        self._guided: tuple[Inputs, tuple[Any, ...], Tensor, int] | None = None
        self._now = threading.local()  # calls may come side by side
        self._rotation.take(self._rotated)
        self._norm.take(self._normed)
        self._project.take(self._projected)
        if type(self._vector).__name__ == GUIDED:
            self._waves = Slot(self._vector.time_proj)
            self.slots.append(self._waves)
            self._waves.take(self._waved)

    def begin(self, given: Mapping[str, Any]) -> None:
        """A call begins. given: its arguments by name."""
        self._now.positions = Inputs.of(given.get("txt_ids"), given.get("img_ids"))
        self._now.guidance, self._now.waves = Inputs.of(given.get("guidance")), 0

    def last_layer(self, image: Tensor, *, vector: Tensor) -> None:
        """Launches it for a stand-in, (B, N, C); vector: the call's time and prompt, (B, C)."""
        if image.is_inference() or any(_hooked(slot.module, image.device) for slot in (self._norm, self._project)):
            return
        normed = self._norm.inner(image, vector)
        self._now.made = Made(image, image._version, vector, normed, self._project.inner(normed))

    def forget(self) -> None:
        """The call is over."""
        self._now.positions = self._now.guidance = self._now.made = None

    def end(self) -> None:
        """The run is over."""
        self._kept.clear()
        self._guided = None
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

    def _waved(self, *args: Any, **kwargs: Any) -> Any:
        """The time's sines, and then the guidance's, which are the same at every step."""
        assert self._waves is not None
        guidance = None if torch.compiler.is_compiling() else getattr(self._now, "guidance", None)
        if guidance is None:
            return self._waves.inner(*args, **kwargs)
        self._now.waves += 1
        # Within a recording or a graph of the whole vector, what is kept here would be taken for its own.
        if self._now.waves != 2 or kwargs or len(args) != 1 or self._vector._compiled_call_impl is not None:
            return self._waves.inner(*args, **kwargs)
        kind = args[0].dtype, args[0].device, args[0].shape
        if self._guided is not None and not _heard(self._waves.module):
            kept, like, found, version = self._guided
            if kept.serve(guidance) and like == kind and found._version == version:
                return found
        made: Tensor = self._waves.inner(*args)
        self._guided = None if made.is_inference() else (guidance, kind, made, made._version)
        return made

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
    if "forward" in own or "_hf_hook" in own or "_diffusers_hook" in own:
        return True
    if own["_forward_pre_hooks"] or own["_forward_hooks"]:
        return True
    return any(child is not None and _heard(child) for child in own["_modules"].values())


def _elsewhere(module: nn.Module, device: torch.device) -> bool:
    own = module.__dict__
    if any(weight is not None and weight.device != device for weight in own["_parameters"].values()):
        return True
    return any(child is not None and _elsewhere(child, device) for child in own["_modules"].values())
