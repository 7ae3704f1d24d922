"""diffusers_parts.py gives token caching access to what is inside diffusers' FLUX blocks: modulation, MLP, outputs.

Everything is called through the host's own modules, so LoRA, quantised layers and layer-wise casting take part.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hasten.call import Call
from hasten.gate import Gate
from hasten.hosts.diffusers_families import FluxStreams, noise_tokens
from hasten.parts import Modulation, Parts, Seen
from hasten.plan import Plan
from hasten.taps import Taps, empty, heard
from hasten.tokens import attention_score, value_norm

Rotary = tuple[Tensor, Tensor] | None


def tapped(block: Any, score: str | None) -> Iterator[nn.Module]:
    """The modules of a block that have to be listened to. score: "attention", "value", or None for neither."""
    attn, double = block.attn, is_double(block)
    yield from (attn, block.ff, block.ff_context) if double else (block.proj_out,)
    if score == "attention":
        yield from (attn.norm_q, attn.norm_k)
        yield from (attn.norm_added_q, attn.norm_added_k) if double else ()
    if score == "value":
        fused = attn.fused_projections
        yield attn.to_qkv if fused else attn.to_v
        if double:
            yield attn.to_added_qkv if fused else attn.add_v_proj


def is_double(block: Any) -> bool:
    """Whether it is a block of two streams."""
    return hasattr(block, "ff_context")


def without_parts(transformer: Any) -> str | None:
    """Why the blocks' parts cannot be called by themselves, or None when they can."""
    for block in (*transformer.transformer_blocks[:1], *transformer.single_transformer_blocks[:1]):
        hooks = getattr(getattr(block, "_diffusers_hook", None), "hooks", {})
        if "group_offloading" in hooks:
            return "blocks are offloaded as a whole, and in part they cannot be run: offload leaf by leaf"
    return None


@dataclass(frozen=True)
class DoubleTrack:
    """Image or text of a double block."""

    stream: str
    norm: Any
    mlp: Any
    temb: Tensor
    eps: float

    def modulation(self) -> Modulation:
        """Six thirds of the norm's linear layer, without its norm; the first two belong to the attention's input."""
        _, _, attention, shift, scale, gate = self.norm.linear(self.norm.silu(self.temb)).unsqueeze(1).chunk(6, dim=-1)
        return Modulation(shift, scale, gate, attention)

    def refresh(self, rows: Tensor, attention: Tensor | None) -> Tensor:
        """The MLP's output for those rows."""
        out: Tensor = self.mlp(rows)
        empty((self.mlp,))
        return out


@dataclass(frozen=True)
class SingleTrack:
    """Text and image joined, in a single block."""

    block: Any
    temb: Tensor
    eps: float
    stream: str = "joint"

    def modulation(self) -> Modulation:
        """One shift, scale and gate for attention and MLP together."""
        norm = self.block.norm
        shift, scale, gate = norm.linear(norm.silu(self.temb)).unsqueeze(1).chunk(3, dim=-1)
        return Modulation(shift, scale, gate, None)

    def refresh(self, rows: Tensor, attention: Tensor | None) -> Tensor:
        """The last linear layer's output for those rows."""
        assert attention is not None
        hidden = self.block.act_mlp(self.block.proj_mlp(rows))
        out: Tensor = self.block.proj_out(torch.cat([attention, hidden], dim=2))
        empty((self.block.proj_out,))
        return out


class FluxParts:
    """One block's parts in one call."""

    def __init__(self, streams: FluxStreams, rotary: Rotary, grid: tuple[int, int] | None) -> None:
        block = streams.block
        self.block, self._streams, self._rotary, self.grid = block, streams, rotary, grid
        self.double = is_double(block)
        self.tracks: tuple[Any, ...] = (
            (
                DoubleTrack("image", block.norm1, block.ff, streams.temb, block.norm2.eps),
                DoubleTrack("text", block.norm1_context, block.ff_context, streams.temb, block.norm2_context.eps),
            )
            if self.double
            else (SingleTrack(block, streams.temb, block.norm.norm.eps),)
        )

    def tensors(self, streams: FluxStreams) -> list[Tensor]:
        """Image and text, or both joined."""
        if self.double:
            return [streams.image, streams.text]
        return [torch.cat([streams.text, streams.image], dim=1)]

    def streams(self, tensors: list[Tensor]) -> FluxStreams:
        """The streams with those tokens."""
        if self.double:
            return replace(self._streams, image=tensors[0], text=tensors[1])
        words = self._streams.text.shape[1]
        return replace(self._streams, text=tensors[0][:, :words], image=tensors[0][:, words:])

    def seen(self) -> list[Seen] | None:
        """What the block's modules gave out."""
        block, words = self.block, self._streams.text.shape[1]
        if not self.double:
            last = heard(block.proj_out)
            if last is None:
                return None
            return [Seen(last.given[0][..., : block.attn.inner_dim], last.out, slice(None))]
        attn, image, text = heard(block.attn), heard(block.ff), heard(block.ff_context)
        if attn is None or image is None or text is None or len(attn.out) != 2:
            return None  # an IP adapter adds a third output
        return [
            Seen(attn.out[0], image.out, slice(words, None)),
            Seen(attn.out[1], text.out, slice(0, words)),
        ]

    def scores(self, kind: str, queries: int) -> Tensor | None:
        """(B, S) over text and image, read off what the norms or the value layers gave out."""
        attn = self.block.attn
        if kind == "value":
            return self._values(attn)
        names = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")[: 4 if self.double else 2]
        taps = [heard(getattr(attn, name)) for name in names]
        if any(tap is None for tap in taps):
            return None
        q, k, *added = (tap.out for tap in taps if tap is not None)
        if added:
            q, k = torch.cat([added[0], q], dim=1), torch.cat([added[1], k], dim=1)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        cos, sin = (None, None) if self._rotary is None else (t[..., ::2] for t in self._rotary)
        return attention_score(q, k, cos, sin, queries=queries)

    def _values(self, attn: Any) -> Tensor | None:
        names = ("to_qkv", "to_added_qkv") if attn.fused_projections else ("to_v", "add_v_proj")
        taps = [heard(getattr(attn, name)) for name in names[: 2 if self.double else 1]]
        if any(tap is None for tap in taps):
            return None
        values = [tap.out.chunk(3, dim=-1)[2] if attn.fused_projections else tap.out for tap in taps if tap is not None]
        return torch.cat([value_norm(v.unflatten(-1, (-1, attn.head_dim))) for v in reversed(values)], dim=1)


class FluxWalk:
    """All blocks of one call, for a partial evaluation with nothing between them."""

    def __init__(
        self, blocks: Sequence[Any], streams: FluxStreams, weights: list[Tensor] | None, state: Hashable
    ) -> None:
        self._blocks, self.weights, self.state = blocks, weights, state
        self.given = (streams.image, streams.text, streams.temb)

    def streams(self, given: Sequence[Tensor]) -> FluxStreams:
        """Those before the first block."""
        image, text, temb = given
        return FluxStreams(text, image, self._blocks[0], temb)

    def parts(self, given: Sequence[Tensor]) -> list[Parts]:
        """Each block's; where the image's tokens lie is of no matter to what is remembered."""
        before = self.streams(given)
        return [FluxParts(replace(before, block=block), None, None) for block in self._blocks]


def staying(blocks: Sequence[nn.Module], device: torch.device) -> list[Tensor] | None:
    """Every weight of the blocks; None where some lie elsewhere or come and go: offloaded, or cast layer by layer."""
    if any(hasattr(m, hook) for b in blocks for m in b.modules() for hook in ("_hf_hook", "_diffusers_hook")):
        return None
    found = [tensor for b in blocks for tensor in (*b.parameters(), *b.buffers())]
    # A tensor of another class (quantised by torchao, say) keeps its numbers in others that are not seen here.
    plain = all(type(t) in (Tensor, nn.Parameter) and t.device == device for t in found)
    return found if plain else None


def strengths(adapters: Sequence[Any]) -> Hashable:
    """What peft's layers do at the moment: which adapters are on, how strongly, and whether any of them is."""
    return tuple(
        (tuple(layer.active_adapters), tuple(layer.scaling.items()), layer.disable_adapters, layer.merged)
        for layer in adapters
    )


class Called(Protocol):
    """A block's place, as diffusers.py takes it over: see its Slot."""

    module: nn.Module

    @property
    def compiled(self) -> bool:
        """Whether it has a compiled call."""

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """Its call without us."""

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The same without its compiled call."""


class Insides:
    """The way into one FLUX transformer's blocks while a recipe that reaches into them is applied."""

    def __init__(self, transformer: Any, plan: Plan) -> None:
        """Raises ValueError where diffusers' own cache sits on the same blocks."""
        if getattr(transformer, "is_cache_enabled", False):
            raise ValueError(
                "diffusers' own cache is enabled on this transformer, and this recipe reaches into the same blocks: "
                "call transformer.disable_cache() first."
            )
        self._transformer, self._plan = transformer, plan
        self._score = plan.tokens.score if plan.refreshes else None
        self._taps = Taps()
        self._grid: tuple[Tensor, tuple[int, int] | None] | None = None
        self._plainly = False
        self._between = False
        self._weights: list[Tensor] | None = None
        self._blocks: list[Any] = []
        self._adapters: list[Any] = []
        self._configs: list[Any] = []

    def listen(self) -> None:
        """Taps what is looked at; again at each run, for a LoRA may have put other modules in place."""
        for block in (*self._transformer.transformer_blocks, *self._transformer.single_transformer_blocks):
            self._taps.put_on(tapped(block, self._score))

    def leave(self) -> None:
        """Leaves every module as it was."""
        self._taps.take_off()

    def end(self) -> None:
        """A run is over."""
        self._grid = self._weights = None
        self._blocks, self._adapters, self._configs = [], [], []

    def begin(self, call: Call, given: Mapping[str, Any]) -> None:
        """Before the model's call: what stands in the way is its excuse, and the image's grid is found."""
        reason = without_parts(self._transformer)
        if reason is not None:
            call.excuse = reason
            call.terms.report.note(reason)
        names = ("controlnet_block_samples", "controlnet_single_block_samples")
        self._between = any(given.get(name) is not None for name in names)
        ids, tokens = given.get("img_ids"), given["hidden_states"].shape[1]
        if self._plan.tokens.spatial > 0.0 and ids is not None and (self._grid is None or self._grid[0] is not ids):
            self._grid = ids, grid_of(ids, tokens)

    def walk(self, streams: FluxStreams) -> FluxWalk | None:
        """All blocks at once, where the model adds nothing between them."""
        if self._between:
            return None
        configs = [*getattr(self._transformer, "peft_config", {}).values()]
        known = len(configs) == len(self._configs) and all(map(operator.is_, configs, self._configs))
        if not self._blocks or not known:  # a LoRA that is loaded or unloaded within the run replaces modules
            self._configs = configs
            found = (*self._transformer.transformer_blocks, *self._transformer.single_transformer_blocks)
            self._blocks = [getattr(block, "_orig_mod", block) for block in found]
            self._weights = staying(self._blocks, streams.image.device)
            parts = (module for block in self._blocks for module in block.modules())
            self._adapters = [
                module for module in parts if hasattr(module, "active_adapters") and hasattr(module, "scaling")
            ]
        return FluxWalk(self._blocks, streams, self._weights, strengths(self._adapters))

    def gated_block(self, slot: Called, gate: Gate, calling: Callable[[], Call | None]) -> Callable[..., Any]:
        """What takes the place of a block's call. calling: the model's call under way."""
        block: Any = getattr(slot.module, "_orig_mod", slot.module)
        names = list(inspect.signature(block.forward).parameters)

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = calling()
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if call is not None and call.ahead is not None and gate.block != call.plan.end:
                return given["encoder_hidden_states"], given["hidden_states"]
            modules = list(tapped(block, self._score))
            if call is None:
                try:
                    return slot.inner(*args, **kwargs)
                finally:
                    empty(modules)
            streams = FluxStreams(given["encoder_hidden_states"], given["hidden_states"], block, given["temb"])
            grid = None if self._grid is None else self._grid[1]
            parts = FluxParts(streams, given.get("image_rotary_emb"), grid)

            def run() -> FluxStreams:
                text, image = (slot.plain if self._plainly else slot.inner)(*args, **kwargs)
                if slot.compiled and not self._plainly and parts.seen() is None:
                    # Compiled before it was listened to, so what happens inside is not heard.
                    self._plainly = True
                    call.terms.report.note(
                        "the blocks were compiled before this recipe was applied: they were run uncompiled; apply the "
                        "recipe first"
                    )
                    text, image = slot.plain(*args, **kwargs)
                return replace(streams, text=text, image=image)

            try:
                after = gate(
                    call, streams, run, lambda image: replace(streams, image=image), parts, lambda: self.walk(streams)
                )
            finally:
                empty(modules)
            return after.text, after.image

        return forward


def grid_of(ids: Tensor, tokens: int) -> tuple[int, int] | None:
    """The image tokens' rows and columns; None where they are no full grid. One read of the device."""
    noise = ids.reshape(-1, ids.shape[-2], ids.shape[-1])[0, : noise_tokens(ids, tokens)]
    rows, columns = (int(noise[:, axis].max() - noise[:, axis].min()) + 1 for axis in (1, 2))
    return (rows, columns) if rows * columns == len(noise) == tokens else None
