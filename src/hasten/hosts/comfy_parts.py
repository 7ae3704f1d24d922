"""comfy_parts.py gives token caching access to what is inside ComfyUI's Flux blocks: modulation, MLP, outputs.

Everything is called through the host's own modules, so low-VRAM casting, FP8, GGUF and LoRA take part.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.parts import Modulation, Parts, Seen
from hasten.taps import empty, heard
from hasten.tokens import attention_score, value_norm


def tapped(block: Any, scored: bool) -> Iterator[nn.Module]:
    """The modules of a block that have to be listened to. scored: its tokens are scored by attention or values."""
    if not is_double(block):
        yield from (block.linear2, block.norm) if scored else (block.linear2,)
        return
    yield from (block.img_attn.proj, block.txt_attn.proj, block.img_mlp, block.txt_mlp)
    if scored:
        yield from (block.img_attn.norm, block.txt_attn.norm)


def is_double(block: Any) -> bool:
    """Whether it is a block of two streams."""
    return hasattr(block, "img_mlp")


def has_mlp(network: Any) -> bool:
    """Whether every block has the MLP of FLUX.1, through which tokens can be sent by themselves."""
    plain = all(type(block.img_mlp) is nn.Sequential for block in network.double_blocks)
    return plain and all(
        isinstance(getattr(block, "mlp_act", None), nn.GELU) and not getattr(block, "yak_mlp", False)
        for block in network.single_blocks
    )


@dataclass(frozen=True)
class DoubleTrack:
    """Image or text of a double block."""

    stream: str
    mod: Any
    mlp: Any
    vec: Tensor
    eps: float

    def modulation(self) -> Modulation:
        """Of the two modulations the first's gate is the attention's, the second is the MLP's."""
        attention, second = self.mod(self.vec)
        return Modulation(second.shift, second.scale, second.gate, attention.gate)

    def refresh(self, rows: Tensor, attention: Tensor | None) -> Tensor:
        """The MLP's output for those rows."""
        out: Tensor = self.mlp(rows)
        empty((self.mlp,))
        return out


@dataclass(frozen=True)
class SingleTrack:
    """Text and image joined, in a single block."""

    block: Any
    vec: Tensor
    eps: float
    stream: str = "joint"

    def modulation(self) -> Modulation:
        """One shift, scale and gate for attention and MLP together."""
        mod = self.block.modulation(self.vec)[0]
        return Modulation(mod.shift, mod.scale, mod.gate, None)

    def refresh(self, rows: Tensor, attention: Tensor | None) -> Tensor:
        """The last linear layer's output for those rows; of the first one only the MLP's half is run."""
        assert attention is not None
        block = self.block
        hidden = block.mlp_act(mlp_half(block.linear1, rows, 3 * block.hidden_size))
        out: Tensor = block.linear2(torch.cat((attention, hidden), 2))
        empty((block.linear2,))
        return out


def mlp_half(linear: Any, rows: Tensor, first: int) -> Tensor:
    """The fused linear layer's outputs from `first` on: by the host's own layer on a view of its weight.

    A weight that cannot be cut by rows (GGUF's blocks, a patch that is worked in as the weight is cast, a quantised
    tensor) is run whole on those rows, and the other outputs are dropped.
    """
    weight, bias = linear.weight, linear.bias
    plain = type(weight) in (Tensor, nn.Parameter) and not getattr(linear, "weight_function", None)
    if not plain or getattr(linear, "bias_function", None) or weight.ndim != 2 or weight.shape[1] != rows.shape[-1]:
        return linear(rows)[..., first:]  # type: ignore[no-any-return]
    # A copy of the module's shell alone: its class, and with it the host's own forward, stays.
    half = copy.copy(linear)
    half._parameters = {"weight": _view(weight, first), "bias": None if bias is None else _view(bias, first)}
    half.out_features = weight.shape[0] - first
    out: Tensor = half(rows)
    return out


def _view(weight: Tensor, first: int) -> nn.Parameter:
    return nn.Parameter(weight.detach()[first:], requires_grad=False)


class FluxParts:
    """One block's parts in one call. args: what ComfyUI hands a block; double: the image and text to hand back."""

    def __init__(self, block: Any, args: dict[str, Any], text_tokens: int, grid: tuple[int, int] | None) -> None:
        self.block, self._args, self._words, self.grid = block, args, text_tokens, grid
        self.double, vec = is_double(block), args["vec"]
        self.tracks: tuple[Any, ...] = (
            (
                DoubleTrack("image", block.img_mod, block.img_mlp, vec, block.img_norm2.eps),
                DoubleTrack("text", block.txt_mod, block.txt_mlp, vec, block.txt_norm2.eps),
            )
            if self.double
            else (SingleTrack(block, vec, block.pre_norm.eps),)
        )

    def tensors(self, streams: Any) -> list[Tensor]:
        """Image and text, or both joined."""
        return [self._args["img"], self._args["txt"]] if self.double else [streams.joint]

    def streams(self, tensors: list[Tensor]) -> Any:
        """What the host takes back, (image, text) or (joint,)."""
        return Tokens(tuple(tensors), self._words)

    def seen(self) -> list[Seen] | None:
        """What the block's modules gave out."""
        block, words = self.block, self._words
        if not self.double:
            last = heard(block.linear2)
            return None if last is None else [Seen(last.given[0][..., : block.hidden_size], last.out, slice(None))]
        taps = [heard(m) for m in (block.img_attn.proj, block.img_mlp, block.txt_attn.proj, block.txt_mlp)]
        if getattr(block, "flipped_img_txt", False) or any(tap is None for tap in taps):
            return None
        image, image_mlp, text, text_mlp = (tap.out for tap in taps if tap is not None)
        return [Seen(image, image_mlp, slice(words, None)), Seen(text, text_mlp, slice(0, words))]

    def scores(self, kind: str, queries: int) -> Tensor | None:
        """(B, S) over text and image, read off what the norms were given and gave out; None under a mask."""
        block, pe = self.block, self._args.get("pe")
        norms = (block.txt_attn.norm, block.img_attn.norm) if self.double else (block.norm,)
        taps = [heard(norm) for norm in norms]
        if self._args.get("attn_mask") is not None or any(tap is None for tap in taps):
            return None
        if kind == "value":
            return torch.cat([value_norm(tap.given[2].transpose(1, 2)) for tap in taps if tap is not None], dim=1)
        q, k = (torch.cat([tap.out[i] for tap in taps if tap is not None], dim=2) for i in (0, 1))
        cos, sin = (None, None) if pe is None else (pe[..., 0, 0], pe[..., 1, 0])
        return attention_score(q, k, cos, sin, queries=queries)


class FluxWalk:
    """All blocks of one call, for a partial evaluation with nothing between them. args: the first block's."""

    def __init__(self, network: Any, args: dict[str, Any], weights: list[Tensor] | None) -> None:
        blocks = (*network.double_blocks, *network.single_blocks)
        self._blocks = [getattr(block, "_orig_mod", block) for block in blocks]
        self._args, self.weights, self.state = args, weights, None
        self.given = (args["img"], args["txt"], args["vec"])

    def streams(self, given: Sequence[Tensor]) -> Tokens:
        """Those before the first block."""
        return Tokens((given[0], given[1]), given[1].shape[1])

    def parts(self, given: Sequence[Tensor]) -> list[Parts]:
        """Each block's; where the image's tokens lie is of no matter to what is remembered."""
        image, text, vec = given
        args = {**self._args, "img": image, "txt": text, "vec": vec}
        return [FluxParts(block, args, text.shape[1], None) for block in self._blocks]


def staying(network: Any, device: torch.device) -> list[Tensor] | None:
    """Every weight of the blocks; None where some lie elsewhere, are cast as they are used, or are of another kind."""
    found: list[Tensor] = []
    for block in (*network.double_blocks, *network.single_blocks):
        for module in block.modules():
            casts = getattr(module, "comfy_cast_weights", False)
            if casts or getattr(module, "weight_function", None) or getattr(module, "bias_function", None):
                return None
        found += (*block.parameters(), *block.buffers())
    plain = all(type(t) in (Tensor, nn.Parameter) and t.device == device for t in found)
    return found if plain else None


@dataclass(frozen=True)
class Tokens:
    """A block's tokens after it, as (image, text) or (joint,), with the image within reach."""

    tensors: tuple[Tensor, ...]
    text_tokens: int

    @property
    def image(self) -> Tensor:
        """The image tokens, (B, N, C)."""
        return self.tensors[0] if len(self.tensors) > 1 else self.tensors[0][:, self.text_tokens :]

    @property
    def joint(self) -> Tensor:
        """A single block's stream, (B, L + N, C), text first."""
        return self.tensors[0] if len(self.tensors) == 1 else torch.cat((self.tensors[1], self.tensors[0]), 1)

    @property
    def out(self) -> dict[str, Any]:
        """What the host takes back from a double block."""
        return {"img": self.tensors[0], "txt": self.tensors[1]}
