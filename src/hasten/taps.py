"""taps.py listens to modules inside a host's block: what each was last given and gave out.

A tap is a forward hook on a module *instance* and an object beside it; both are gone when it is taken off. The hook is
one function for all modules and only assigns attributes, so a compiled block traces it without a break or a recompile
(one that was compiled before it was tapped does not see it: then nothing is heard, and the host is told so).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

NAME = "hasten_tap"


class Tap:
    """What one module was last given (its positional arguments) and gave out; None before and once it was taken."""

    def __init__(self) -> None:
        self.given: Any = None
        self.out: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model is listened to by nobody."""


class Taps:
    """The taps of one model, put on and taken off together."""

    def __init__(self) -> None:
        self._on: dict[int, tuple[nn.Module, RemovableHandle]] = {}

    def put_on(self, modules: Iterable[nn.Module]) -> None:
        """Listens to those modules too; those that are listened to already are left alone."""
        for module in modules:
            if id(module) not in self._on:
                setattr(module, NAME, Tap())
                self._on[id(module)] = module, module.register_forward_hook(_record)

    def empty(self) -> None:
        """Forgets everything that was heard."""
        empty(module for module, _ in self._on.values())

    def take_off(self) -> None:
        """Leaves every module as it was."""
        for module, handle in self._on.values():
            handle.remove()
            module.__dict__.pop(NAME, None)
        self._on.clear()


def heard(module: nn.Module) -> Tap | None:
    """The module's tap, where it heard something since it was last emptied."""
    tap: Tap | None = module.__dict__.get(NAME)
    return tap if tap is not None and tap.out is not None else None


def empty(modules: Iterable[nn.Module]) -> None:
    """Forgets what was heard: activations must not outlive their block."""
    for module in modules:
        tap: Tap | None = module.__dict__.get(NAME)
        if tap is not None:
            tap.given = tap.out = None


def _record(module: Any, given: Any, out: Any) -> None:
    tap = getattr(module, NAME, None)
    if tap is not None:
        tap.given = given
        tap.out = out
