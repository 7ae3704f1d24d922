"""diffusers_stack.py transforms a diffusers FLUX once, before any gate: quantise, lay together, fuse, compile.

Each block's call is taken over in torch's own slot for a compiled call; the blocks themselves keep their places, names
and forwards. `undo` gives calls back, and weights where their originals were kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hasten.compile import Compiler
from hasten.hosts.diffusers_blocks import fused, lay_layers_together
from hasten.quantize import FORMATS, Quantised

# What stays in the model's own dtype, and why. Modulation sees one row for each picture: nothing to gain, and its error
# falls on every token. Embedders and the last layer are small and stand at the ends, where no later layer evens it out.
QUANTISED = ("attn.", "ff.", "ff_context.", "proj_mlp", "proj_out")


class Stack:
    """What was done to one transformer. bits: "fp8", "int8" or None; say: takes a sentence for the report."""

    def __init__(
        self,
        transformer: nn.Module,
        *,
        bits: str | None = None,
        fuse: bool = True,
        compiler: Compiler | None = None,
        keep: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.compiler = compiler
        self._blocks: list[Any] = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]  # type: ignore[misc]
        self._before = [block._compiled_call_impl for block in self._blocks]
        self._quantised: Quantised | None = None
        if bits is not None:
            self._quantised = Quantised(self._blocks, FORMATS[bits], wanted=_wanted, keep=keep)
        for block in self._blocks:
            stand_in = fused(block) if fuse else None
            if stand_in is not None:
                lay_layers_together(block)
            call = stand_in or block
            block._compiled_call_impl = call._call_impl if compiler is None else compiler.compile(call)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def undo(self) -> None:
        """Gives the blocks their calls back, and their weights where they were kept."""
        for block, before in zip(self._blocks, self._before, strict=True):
            block._compiled_call_impl = before
        if self._quantised is not None:
            self._quantised.undo()


def _wanted(name: str) -> bool:
    return name.startswith(QUANTISED)
