"""operation.py makes a function an operation of torch that torch.compile sees as one step.

The same as torch.library.custom_op without its wrappers for autograd and for aliasing: at some four hundred calls a
model evaluation those cost more than the launches themselves. Ours are for inference, and give out new tensors only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

# An operation lives as long as the library that it was defined in.
_LIBRARY = torch.library.Library("hasten", "FRAGMENT")

Function = Callable[..., Any]


def operation(name: str, *, shapes: Function) -> Callable[[Function], Function]:
    """Registers the decorated function as torch.ops.hasten.<name>, its schema read off its annotations.

    shapes: the same arguments to empty tensors of the results' shapes, strides and dtypes, without doing the work.
    """

    def register(function: Function) -> Function:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _without_gradients(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"hasten::{name}", shapes, lib=_LIBRARY)
        return function

    return register


def _without_gradients(function: Function) -> Function:
    """The function, never recorded: results are written into place, which torch refuses while it records."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args)
        with torch.no_grad():
            return function(*args)

    return run
