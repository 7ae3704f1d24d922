"""diffusers_families.py says how each family of diffusers' transformers is reached: blocks, streams, noise, time.

A family is a handful of readings of a module and of the arguments that its forward is given. It hangs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hasten.anatomy import Anatomy, flux, sana
from hasten.gate import Streams

Given = Mapping[str, Any]


class Family(Protocol):
    """One transformer's family. given: arguments of a forward, by their names."""

    anatomy: Anatomy
    blocks: list[nn.Module]

    def streams(self, block: nn.Module, given: Given) -> Streams:
        """What flows into a block."""

    def after(self, streams: Any, out: Any) -> Streams:
        """What flows out of it, from what its forward returned."""

    def with_image(self, streams: Any, image: Tensor) -> Streams:
        """The same streams with the image tokens replaced."""

    def returned(self, streams: Any) -> Any:
        """What the block's forward would have returned for those streams."""

    def untouched(self, given: Given) -> Any:
        """What it would have returned, had it done nothing."""

    def noise(self, given: Given) -> Tensor:
        """The model's input cut to what its output stands for, (B, ...)."""

    def cut(self, sample: Tensor, noise: Tensor) -> Tensor:
        """The model's output cut likewise."""

    def whole(self, sample: Tensor, given: Given) -> Tensor:
        """An output cut likewise, made as large as the model's own."""

    def sigma(self, timestep: float) -> float:
        """The schedule's entry that the model's own time stands for."""

    def condition(self, given: Given) -> object:
        """What the run is conditioned on: one and the same object for one and the same content."""

    def end(self) -> None:
        """A run is over: nothing of it is kept."""


def family_of(transformer: Any) -> Family:
    """The family of a diffusers transformer. Raises ValueError for a model that is not known here."""
    from diffusers import FluxTransformer2DModel, SanaTransformer2DModel

    if isinstance(transformer, FluxTransformer2DModel):
        return FluxFamily(transformer)
    if isinstance(transformer, SanaTransformer2DModel):
        return SanaFamily(transformer)
    raise ValueError(
        f"{type(transformer).__name__} is not a model that hasten knows: a FluxTransformer2DModel or a "
        "SanaTransformer2DModel is expected."
    )


def _expect_here(part: nn.Module, image: Tensor) -> None:
    """RuntimeError if a weight lies elsewhere than the image and no hook within the part brings it: a CPU's matrix
    product with a weight on the meta device does not fail, it gives whatever lay in memory."""
    if any(hasattr(module, hook) for module in part.modules() for hook in ("_hf_hook", "_diffusers_hook")):
        return
    if any(weight.device != image.device for weight in part.parameters()):
        raise RuntimeError("the weights lie on another device than the image")


@dataclass(frozen=True)
class FluxStreams:
    """diffusers' double and single blocks alike take and give text and image apart, (B, L, C) and (B, N, C)."""

    text: Tensor
    image: Tensor
    block: Any
    temb: Tensor

    def modulated(self) -> Tensor:
        """The image tokens after the first double block's norm, scale and shift, (B, N, C)."""
        _expect_here(self.block.norm1, self.image)
        normed: Tensor = self.block.norm1(self.image, emb=self.temb)[0]
        return normed


class FluxFamily:
    """FLUX.1: text to image, fill, control and Kontext."""

    def __init__(self, transformer: Any) -> None:
        double, single = transformer.transformer_blocks, transformer.single_transformer_blocks
        self.anatomy = flux(len(double), len(single))
        self.blocks: list[nn.Module] = [*double, *single]
        self._config = transformer.config
        self._counted: tuple[Tensor, int] | None = None

    def streams(self, block: nn.Module, given: Given) -> FluxStreams:
        """See Family."""
        return FluxStreams(given["encoder_hidden_states"], given["hidden_states"], block, given["temb"])

    def after(self, streams: FluxStreams, out: tuple[Tensor, Tensor]) -> FluxStreams:
        """See Family."""
        text, image = out
        return replace(streams, text=text, image=image)

    def with_image(self, streams: FluxStreams, image: Tensor) -> FluxStreams:
        """See Family."""
        return replace(streams, image=image)

    def returned(self, streams: FluxStreams) -> tuple[Tensor, Tensor]:
        """See Family."""
        return streams.text, streams.image

    def untouched(self, given: Given) -> tuple[Tensor, Tensor]:
        """See Family."""
        return given["encoder_hidden_states"], given["hidden_states"]

    def noise(self, given: Given) -> Tensor:
        """See Family. (B, N, C), read off the noise tokens' noise channels.

        Fill and control models take more channels in than they give out; Kontext has its reference picture's tokens
        behind the noise, and its pipeline drops what comes out for them: a stand-in has zeros there.
        """
        x, ids = given["hidden_states"], given.get("img_ids")
        channels, tokens = self._config.out_channels or self._config.in_channels, x.shape[1]
        if ids is not None:
            if self._counted is None or self._counted[0] is not ids:
                self._counted = ids, noise_tokens(ids, tokens)
            tokens = self._counted[1]
        noise: Tensor = x[:, :tokens, :channels]
        return noise

    def cut(self, sample: Tensor, noise: Tensor) -> Tensor:
        """See Family."""
        return sample[:, : noise.shape[1]]

    def whole(self, sample: Tensor, given: Given) -> Tensor:
        """See Family."""
        return nn.functional.pad(sample, (0, 0, 0, given["hidden_states"].shape[1] - sample.shape[1]))

    def sigma(self, timestep: float) -> float:
        """See Family: pipelines hand over the sigma itself."""
        return timestep

    def condition(self, given: Given) -> object:
        """See Family."""
        return given.get("encoder_hidden_states")

    def end(self) -> None:
        """See Family."""
        self._counted = None


@dataclass(frozen=True)
class SanaStreams:
    """Sana's blocks change the image tokens alone, (B, N, C). table: the time's six modulations, (B, 6 C)."""

    image: Tensor
    block: Any
    table: Tensor

    def modulated(self) -> Tensor:
        """The image tokens after the first block's norm, scale and shift, (B, N, C)."""
        times = self.table.reshape(self.image.shape[0], 6, -1)[:, :2]
        shift, scale = (self.block.scale_shift_table[None, :2] + times).chunk(2, dim=1)
        normed: Tensor = self.block.norm1(self.image) * (1 + scale) + shift
        return normed.to(self.image.dtype)


class SanaFamily:
    """Sana, Sana 1.5 and Sana Sprint, with or without a ControlNet."""

    def __init__(self, transformer: Any) -> None:
        self.anatomy = sana(len(transformer.transformer_blocks))
        self.blocks: list[nn.Module] = list(transformer.transformer_blocks)
        config = transformer.config
        self._channels, self._out = config.in_channels, config.out_channels or config.in_channels
        # Sprint's time is the sigma; the others' is a thousandth part's count, times a factor of Sana's own.
        self._unit = 1.0 if config.guidance_embeds else 1000.0 * config.timestep_scale
        self._conditions: list[tuple[Tensor, Tensor | None]] = []

    def streams(self, block: nn.Module, given: Given) -> SanaStreams:
        """See Family."""
        return SanaStreams(given["hidden_states"], block, given["timestep"])

    def after(self, streams: SanaStreams, out: Tensor) -> SanaStreams:
        """See Family."""
        return replace(streams, image=out)

    def with_image(self, streams: SanaStreams, image: Tensor) -> SanaStreams:
        """See Family."""
        return replace(streams, image=image)

    def returned(self, streams: SanaStreams) -> Tensor:
        """See Family."""
        return streams.image

    def untouched(self, given: Given) -> Tensor:
        """See Family."""
        image: Tensor = given["hidden_states"]
        return image

    def noise(self, given: Given) -> Tensor:
        """See Family. (B, C, H, W)."""
        x: Tensor = given["hidden_states"]
        return x

    def cut(self, sample: Tensor, noise: Tensor) -> Tensor:
        """See Family: a model that also predicts a variance has it behind the velocity."""
        return sample[:, : self._channels]

    def whole(self, sample: Tensor, given: Given) -> Tensor:
        """See Family."""
        return nn.functional.pad(sample, (0, 0, 0, 0, 0, self._out - sample.shape[1]))

    def sigma(self, timestep: float) -> float:
        """See Family."""
        return timestep / self._unit

    def condition(self, given: Given) -> object:
        """See Family.

        Sana's pipelines cast the embeddings anew for every step where encoder and transformer differ in dtype, as the
        authors' own settings do: what is equal is the same condition. One comparison a call then, none otherwise.
        """
        words, mask = given["encoder_hidden_states"], given.get("encoder_attention_mask")
        for known in self._conditions:
            if known[0] is words and known[1] is mask:
                return known
        for known in self._conditions:
            if _equal(known[0], words) and _equal(known[1], mask):
                return known
        self._conditions = [*self._conditions[-7:], (words, mask)]
        return self._conditions[-1]

    def end(self) -> None:
        """See Family."""
        self._conditions = []


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    like = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return like and torch.equal(one, other)


def noise_tokens(ids: Tensor, count: int) -> int:
    """How many of `count` image tokens are noise: Kontext's reference tokens follow them, with 1 on the first axis.

    ids: (N, 3) or (B, N, 3). One read of the device.
    """
    first = ids.reshape(-1, ids.shape[-2], ids.shape[-1])[0, :, 0]
    of_noise = (first == 0).tolist()
    leading = of_noise.index(False) if False in of_noise else count
    return leading if 0 < leading < count and not any(of_noise[leading:]) else count
