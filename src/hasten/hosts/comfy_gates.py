"""comfy_gates.py hangs a gate around each of a Flux network's blocks, as ComfyUI's block patches have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from hasten.call import Call
from hasten.gate import Gate
from hasten.hosts.comfy_parts import FluxParts, FluxWalk
from hasten.taps import empty

Patch = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


class Held:
    """One call under way, the network that runs it (a device's own, where conditions are split over several), and
    how many text tokens lead its joint stream (known once a double block was met). between: a ControlNet adds to what
    the blocks give out.
    """

    __slots__ = ("between", "call", "network", "text_tokens")

    def __init__(self, call: Call, network: Any) -> None:
        self.call, self.network = call, network
        self.text_tokens = 0
        self.between = False

    def passes(self, gate: Gate) -> bool:
        """Whether a block's tokens pass it by, because the first gate walked through all of them."""
        return self.call.ahead is not None and gate.block != self.call.plan.end


class Listening(Protocol):
    """What the patches ask of the run that they hang in."""

    def held(self, args: Mapping[str, Any]) -> Held | None:
        """The call that a block's arguments belong to; None outside of any."""

    def parts(self, held: Held, block: int, args: dict[str, Any]) -> FluxParts | None:
        """The way into a block, counted from 0 over all of them; None where no recipe reaches inside."""

    def walk(self, held: Held, args: dict[str, Any]) -> FluxWalk | None:
        """All blocks at once from the first one's arguments, where nothing is known to lie between them."""

    def tapped(self, block: Any) -> list[Any]:
        """The modules of a block that are listened to."""


@dataclass(slots=True)
class DoubleStreams:
    """A double block's streams: text (B, L, C) and image (B, N, C) apart. out: what the host takes back."""

    image: Tensor
    out: dict[str, Any]
    vec: Any
    network: Any

    def modulated(self) -> Tensor:
        """The image tokens after the first double block's norm, scale and shift, (B, N, C)."""
        if hasattr(self.network, "modulated"):  # a network of ours knows itself
            own: Tensor = self.network.modulated(self.image, self.vec)
            return own
        block = self.network.double_blocks[0]
        scale_and_shift = block.img_mod(self.vec)[0]
        normed: Tensor = block.img_norm1(self.image)
        modulated: Tensor = normed * (1 + scale_and_shift.scale) + scale_and_shift.shift
        return modulated


@dataclass(slots=True)
class JointStream:
    """A single block's stream: text and image tokens joined, (B, L + N, C), text first."""

    joint: Tensor
    text_tokens: int

    @property
    def image(self) -> Tensor:
        """The image tokens, (B, N, C): a view."""
        return self.joint[:, self.text_tokens :]

    def modulated(self) -> Tensor:
        """Only the first double block has a modulated input that is looked at."""
        raise AssertionError("TeaCache looks at the first double block")


def hung_on_double(run: Listening, gate: Gate, found: Patch | None) -> Patch:
    """The patch for a double block; `found` is the entry that another pack put there before, run as the block."""

    def patch(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        held = run.held(args)
        if held is None:
            return _run(found, args, extra)
        held.text_tokens = args["txt"].shape[1]
        if held.passes(gate):
            return {"img": args["img"], "txt": args["txt"]}

        def through() -> DoubleStreams:
            out = _run(found, args, extra)
            return DoubleStreams(out["img"], out, None, None)

        def with_image(image: Tensor) -> DoubleStreams:
            return DoubleStreams(image, {"img": image, "txt": args["txt"]}, None, None)

        entering = DoubleStreams(args["img"], args, args["vec"], held.network)
        parts = run.parts(held, gate.block, args)
        after = gate(held.call, entering, through, with_image, parts, lambda: run.walk(held, args))
        if parts is not None:
            empty(run.tapped(parts.block))
        return {"img": args["img"], "txt": args["txt"]} if after is entering else after.out

    return patch


def hung_on_single(run: Listening, gate: Gate, found: Patch | None) -> Patch:
    """The patch for a single block; as hung_on_double."""

    def patch(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        held = run.held(args)
        if held is None:
            return _run(found, args, extra)
        joint, text_tokens = args["img"], held.text_tokens
        if held.passes(gate):
            return {"img": joint}

        def through() -> JointStream:
            return JointStream(_run(found, args, extra)["img"], text_tokens)

        def with_image(image: Tensor) -> JointStream:
            # Text is dropped after the last block: what it holds by then is of no consequence.
            whole = joint.clone()
            whole[:, text_tokens:] = image
            return JointStream(whole, text_tokens)

        parts = run.parts(held, gate.block, args)
        after = gate(held.call, JointStream(joint, text_tokens), through, with_image, parts)
        if parts is not None:
            empty(run.tapped(parts.block))
        return {"img": after.joint}

    return patch


def _run(found: Patch | None, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    if found is not None:
        return found(args, extra)
    out: dict[str, Any] = extra["original_block"](args)
    return out
