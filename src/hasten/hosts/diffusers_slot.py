"""diffusers_slot.py takes a module's `__call__` over: torch's own slot for a compiled call, on the instance alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Slot:
    """One module's `__call__`, taken over while a handle lives."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._before = module._compiled_call_impl
        self._gated: Callable[..., Any] | None = None

    @property
    def compiled(self) -> bool:
        """Whether calling the module without us would run a compiled call."""
        return self._before is not None

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """What calling the module would do without us: its compiled call when it has one."""
        return (self._before or self.module._call_impl)(*args, **kwargs)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """What calling the module would do without us and without its compiled call."""
        return self.module._call_impl(*args, **kwargs)

    def take(self, gated: Callable[..., Any]) -> None:
        """Puts `gated` in the way of every call of the module."""
        self._gated = gated
        self.module._compiled_call_impl = gated

    def retake(self) -> None:
        """Goes around whatever was put in our place since (a module compiled while the handle lives)."""
        if self.module._compiled_call_impl is not self._gated:
            self._before = self.module._compiled_call_impl
            self.module._compiled_call_impl = self._gated

    def give_back(self) -> None:
        """Leaves the module as it was, or as it was compiled since."""
        if self.module._compiled_call_impl is self._gated:
            if self._before is None:
                del self.module.__dict__["_compiled_call_impl"]
            else:
                self.module._compiled_call_impl = self._before
