"""seam.py is what a seam looks at: made when it is asked for, and not at all where only its change is."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hasten.recipe import Cache
from hasten.signal import half_cosine, relative_l1, residual_l1


class Signal:
    """One call's signal before one seam, (B, N, C), or none.

    kind: the plan's: "none", "output", "residual" or "modulated". image: the seam's input, the host's own tensor.
    entry: the input of the block that a residual is measured from. modulated: gives block 0's modulated input, or None.
    """

    def __init__(
        self, kind: str, cache: Cache, image: Tensor, entry: Tensor | None, modulated: Callable[[], Tensor | None]
    ) -> None:
        self._kind, self._cache, self._image, self._entry, self._modulated = kind, cache, image, entry, modulated
        self._made: Tensor | None = None

    def own(self) -> Tensor | None:
        """The signal to keep: nobody else's tensor."""
        return self._image.clone() if self._kind == "output" else self._now()

    def change(self, rows: slice, before: Tensor | None) -> Tensor | None:
        """How far those rows of the batch have come from `before`, as a number on its device; None without either."""
        if before is None:
            return None
        relative_to = self._cache.relative_to
        if self._kind == "residual" and self._cache.distance != "cosine" and self._entry is not None:
            return residual_l1(self._image[rows], self._entry[rows], before, relative_to=relative_to)
        now = self._image if self._kind == "output" else self._now()
        if now is None:
            return None
        if self._cache.distance == "cosine":
            return half_cosine(now[rows], before)
        return relative_l1(now[rows], before, relative_to=relative_to)

    def _now(self) -> Tensor | None:
        if self._made is None:
            if self._kind == "residual" and self._entry is not None:
                self._made = self._image - self._entry
            elif self._kind == "modulated":
                self._made = self._modulated()
        return self._made
