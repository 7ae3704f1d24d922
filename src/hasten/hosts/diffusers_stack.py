"""diffusers_stack.py transforms a diffusers FLUX or Sana once, before any gate: quantise, lay together, fuse, compile.

Each block's call is taken over in torch's own slot for a compiled call; the blocks themselves keep their places, names
and forwards. `undo` gives calls back, and weights where their originals were kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hasten.compile import Compiler
from hasten.hosts.diffusers_beside import (
    Beside,
    is_deep_compression,
    keeps_words,
    lay_channels,
    layers_of,
    parts_of,
    reading,
    replayed_layer,
)
from hasten.hosts.diffusers_blocks import fused, lay_layers_apart, lay_layers_together
from hasten.hosts.diffusers_hooks import hooked
from hasten.hosts.diffusers_replay import replayed, replayed_end, replayed_sana
from hasten.hosts.diffusers_sana_block import FusedSana, is_plain, with_dense_tokens
from hasten.hosts.diffusers_sana_decoder import FusedPart
from hasten.hosts.diffusers_sana_decoder import is_plain as is_plain_part
from hasten.quantize import FORMATS, Quantised, format_for
from hasten.recipe import Recipe
from hasten.replay import Replays
from hasten.report import Report
from hasten.sections import Compile, Quantize

# What stays in the model's own dtype, and why. Modulation sees one row for each picture: nothing to gain, and its error
# falls on every token. Embedders and the last layer are small and stand at the ends, where no later layer evens it out.
QUANTISED = ("attn.", "attn1.", "attn2.", "ff.", "ff_context.", "proj_mlp", "proj_out")

HOOKED = "blocks with hooks on them (offloading, casting, listeners) ran as diffusers wrote them"

STACK = "hasten_stack"  # where a transformer's stack is found again


class Stack:
    """What was done to one transformer, and to the modules beside it that are compiled too.

    device: where quantised weights are made; the weights' own if left out. Raises ValueError in one sentence for
    settings that the machine cannot follow; nothing is changed then.
    """

    def __init__(
        self,
        transformer: nn.Module,
        compile: Compile | None = None,
        quantize: Quantize | None = None,
        *,
        beside: Beside | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.transformer = transformer
        self.compile, self.quantize = compile or Compile(), quantize or Quantize()
        self.notes: list[str] = []
        self._before = (0, 0.0)
        self._stepped_aside = False
        blocks = blocks_of(transformer)
        at = device or next(transformer.parameters()).device
        bits = None if self.quantize.format == "none" else format_for(self.quantize.format, at)
        wants = self.compile.blocks or self.compile.decoder or self.compile.text
        self.compiler = self._compiler() if wants else None
        self.replays = self._replays(self.compile.blocks)
        # Apart from the blocks', for each keeps its own few sizes: two prompts' lengths here.
        self.read = self._replays(self.compile.text, lends=False)  # once a prompt: a copy costs nothing
        # Of their own too: what fails or makes room among them leaves the blocks' recordings alone.
        self._ends = self._replays(self.compile.blocks, lends=False)
        self._quantised: Quantised | None = None
        self._taken: list[tuple[nn.Module, Any, Any]] = []
        self._compiles = False
        self._laid: list[nn.Module] = []
        self._last: list[nn.Module] = []
        if bits is not None and not any(_wanted(name) for block in blocks for name, _ in block.named_modules()):
            raise ValueError(
                f"{type(transformer).__name__} has none of the layers that are kept in 8 bits, which are FLUX's: "
                "leave [quantize] out."
            )
        transformer.__dict__[STACK] = self
        try:
            self._build(blocks, beside, bits, device)
        except BaseException:  # out of memory half way, or interrupted
            if self._quantised is None or self._quantised.keeps:
                self.undo()
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _build(
        self, blocks: list[nn.Module], beside: Beside | None, bits: str | None, device: torch.device | None
    ) -> None:
        if bits is not None:
            self._quantised = Quantised(blocks, FORMATS[bits], wanted=_wanted, keep=self.quantize.keep, device=device)
        fuse = self.compile.fuse == "always" or (self.compile.fuse == "auto" and (self.compile.blocks or bits))
        self._fused = [block for block in blocks if fuse and self._take_block(block)]
        if not fuse and self.compile.blocks:
            for block in blocks:
                self._take(block, block)
        if self._fused and self._ends is not None:
            for end in ends_of(self.transformer):
                self._put(end, replayed_end(end, end._call_impl, self._ends))
        self._take_beside(beside or Beside())
        self.words = self._describe(bits)

    @property
    def graphs(self) -> int:
        """How many graphs were compiled so far."""
        return 0 if self.compiler is None else self.compiler.graphs

    @property
    def seconds(self) -> float:
        """How long the back-end took for them."""
        return 0.0 if self.compiler is None else self.compiler.seconds

    def begin(self) -> None:
        """A run begins: what was compiled before is not its own."""
        self._before = self.graphs, self.seconds
        self._stepped_aside = False

    def tell(self, report: Report) -> None:
        """Writes into a run's report what the model is, and what was compiled since it began."""
        report.model = self.words
        taken = sum(replays.bytes for replays in (self.replays, self.read, self._ends) if replays is not None)
        if taken:
            report.model += f", launches replayed ({taken / 2**20:.0f} MiB)"
        report.graphs, report.compile_s = self.graphs - self._before[0], self.seconds - self._before[1]
        for note in (*self.notes, *([HOOKED] if self._stepped_aside else ())):
            report.note(note)

    def serves(self, recipe: Recipe) -> bool:
        """Whether the model is already what the recipe asks for; one that asks for nothing takes it as it is."""
        wanted = recipe.compile, replace(recipe.quantize, keep=True)
        return not recipe.changes_model or wanted == (self.compile, replace(self.quantize, keep=True))

    def undo(self) -> None:
        """Gives the blocks their calls and their weights back.

        Raises ValueError, before anything is changed, when the original weights were not kept.
        """
        if self._quantised is not None:
            self._quantised.undo()
        for module, ours, before in self._taken:
            if module._compiled_call_impl is not ours:
                continue  # compiled by someone else since: left in place
            if before is None:
                del module.__dict__["_compiled_call_impl"]
            else:
                module._compiled_call_impl = before
        for replays in (self.replays, self.read, self._ends):
            if replays is not None:
                replays.drop()
        for block in self._laid:
            lay_layers_apart(block)
        for module in self._last:
            lay_channels(module, torch.contiguous_format)
        self._taken, self._laid, self._last = [], [], []
        if self.transformer.__dict__.get(STACK) is self:
            del self.transformer.__dict__[STACK]

    def _compiler(self) -> Compiler:
        settings = self.compile
        return Compiler(
            backend=settings.backend,
            dynamic=True if settings.dynamic else None,
            limit=settings.limit,
            say=self.notes.append,
        )

    def _replays(self, compiled: bool, *, lends: bool = True) -> Replays | None:
        """Recordings of launches, of fused blocks or of encoders' layers, where they are wanted; see Replays."""
        wanted = self.compile.cuda_graph
        if not torch.cuda.is_available() or wanted == "never" or (wanted == "auto" and not compiled):
            return None
        return Replays(say=self.notes.append, lends=lends)

    def _take_block(self, block: nn.Module) -> bool:
        """Whether the block runs as fused passes from now on; if not, it is at most compiled."""
        stand_in = fused(block)
        if stand_in is not None:
            self._laid.append(block)
            lay_layers_together(block)
        elif is_plain(block):
            stand_in = FusedSana(block)
        if stand_in is not None or self.compile.blocks:
            self._take(block, stand_in or block, compiled=self.compile.blocks)
        return stand_in is not None

    def _take_beside(self, beside: Beside) -> None:
        if beside.decoder is not None:
            if is_deep_compression(beside.decoder):
                self._last.append(beside.decoder)
                lay_channels(beside.decoder, torch.channels_last)
            for part in parts_of(beside.decoder):
                # Compiled, DC-AE would be a graph for each part and width, for half a minute and more.
                fits = self.compile.fuse != "never" and is_plain_part(part)
                self._put(part, FusedPart(part)._call_impl if fits else self._compiled(part))
        for encoder in beside.encoders:
            for layer in layers_of(encoder):
                call = self._compiled(layer)
                self._put(layer, call if self.read is None else replayed_layer(layer, call, self.read))
            if keeps_words(encoder):
                self._put(encoder, reading(encoder._compiled_call_impl or encoder._call_impl))

    def _take(self, module: nn.Module, call: nn.Module, *, compiled: bool = True) -> None:
        ours = self._compiled(call) if compiled else call._call_impl
        if isinstance(call, FusedSana):
            ours = with_dense_tokens(ours)
        if self.replays is not None and call is not module:
            ours = (replayed_sana if isinstance(call, FusedSana) else replayed)(module, ours, self.replays)
        if call is not module:
            ours = self._unless_hooked(module, ours)
        self._put(module, ours)

    def _compiled(self, module: nn.Module) -> Any:
        self._compiles = True
        return module._call_impl if self.compiler is None else self.compiler.compile(module)

    def _put(self, module: nn.Module, ours: Any) -> None:
        self._taken.append((module, ours, module.__dict__.get("_compiled_call_impl")))
        module._compiled_call_impl = ours

    def _unless_hooked(self, block: nn.Module, ours: Any) -> Any:
        """`ours`, or the block as it is while a part has a hook, which fused passes would never call: offloading or
        casting that was enabled since, a listener of the user's."""
        parts = [part for part in block.modules() if not isinstance(part, nn.ModuleList)]

        def run(*args: Any, **kwargs: Any) -> Any:
            if any(map(hooked, parts)):
                self._stepped_aside = True
                return block._call_impl(*args, **kwargs)
            return ours(*args, **kwargs)

        return run

    def _describe(self, bits: str | None) -> str:
        compiled = self._compiles and self.compiler is not None and self.compiler.works
        words = [f"blocks in {bits}"] if bits is not None else []
        words += ["fused passes"] if self._fused else []
        words += ["compiled"] if compiled else []
        return ", ".join(words)


def stack_for(
    transformer: nn.Module,
    recipe: Recipe,
    *,
    beside: Beside | None = None,
    device: torch.device | None = None,
) -> tuple[Stack | None, bool]:
    """The stack that the recipe's runs stand on, and whether it was made for them. Raises ValueError.

    One that is there already serves every recipe that asks for the same, or for nothing.
    """
    found: Stack | None = transformer.__dict__.get(STACK)
    if found is not None:
        if found.serves(recipe):
            return found, False
        raise ValueError(
            "this model is compiled or quantised already, otherwise than the recipe's [compile] and [quantize] say: "
            "undo that first, or leave the two sections out."
        )
    if not recipe.changes_model:
        return None, False
    return Stack(transformer, recipe.compile, recipe.quantize, beside=beside, device=device), True


def blocks_of(transformer: Any) -> list[nn.Module]:
    """The transformer's blocks in the order they run."""
    return [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]


def ends_of(transformer: Any) -> list[nn.Module]:
    """What FLUX's blocks are given beside their tokens: the rotation's tables and the modulation's vector."""
    found = [getattr(transformer, name, None) for name in ("pos_embed", "time_text_embed")]
    return [module for module in found if isinstance(module, nn.Module)]


def _wanted(name: str) -> bool:
    return name.startswith(QUANTISED)
