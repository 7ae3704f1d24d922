"""diffusers_hooks.py answers whether more happens when a module is called than its class's forward."""

from __future__ import annotations

from torch import nn

from hasten.taps import NAME


def hooked(part: nn.Module) -> bool:
    """Whether a listener, offloading, casting or anyone's own forward sits on it; our taps do not count.

    accelerate and diffusers put a forward of theirs on the instance. Asked at every call of every part: a few lookups.
    """
    own = part.__dict__
    return "forward" in own or bool(own["_forward_pre_hooks"]) or len(own["_forward_hooks"]) > (NAME in own)


def parts_of(module: nn.Module) -> list[nn.Module]:
    """The module and all within it, one that hangs in two places twice: `modules()` at a third of its time."""
    found = [module]
    for part in found:  # which grows meanwhile
        found += [child for child in part.__dict__["_modules"].values() if child is not None]
    return found
