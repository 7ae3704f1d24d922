"""diffusers_beside.py: what of a pipeline is compiled beside the transformer: the autoencoder's decoder, and text
encoders layer by layer, whose launches are recorded too.

An encoder launches thousands of small kernels for a few milliseconds of work: Gemma-2-2b waits for Python all the time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.hosts.diffusers_hooks import hooked
from hasten.replay import Replays
from hasten.sections import Compile

# What a layer may be given beside tensors and what holds them.
PLAIN = (bool, int, float, str, type(None))
TENSOR = "a tensor"

Call = Callable[..., Any]


@dataclass(frozen=True)
class Beside:
    """Modules of a pipeline that are compiled with its transformer."""

    decoder: nn.Module | None = None
    encoders: tuple[nn.Module, ...] = ()


def modules_beside(pipe: Any, compile: Compile) -> Beside:
    """What the section asks for of what the pipeline has."""
    vae = getattr(pipe, "vae", None) if compile.decoder else None
    names = ("text_encoder", "text_encoder_2") if compile.text else ()
    found = (getattr(pipe, name, None) for name in names)
    return Beside(None if vae is None else vae.decoder, tuple(module for module in found if module is not None))


def parts_of(decoder: Any) -> Iterator[nn.Module]:
    """What is compiled of a decoder: DC-AE's block by block, whose kinds repeat, anything else as it is."""
    if not is_deep_compression(decoder):
        yield decoder
        return
    for level in decoder.up_blocks:
        yield from level
    yield decoder.norm_out


def is_deep_compression(module: nn.Module) -> bool:
    """Whether it is DC-AE's decoder. Its norms and its attention run over the channels: with those last, nothing is
    turned around between them and the convolutions."""
    return any(type(part).__name__ == "EfficientViTBlock" for part in module.modules())


def lay_channels(module: nn.Module, how: torch.memory_format) -> None:
    """Lays every convolution's weight that way; the values stay as they are."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=how)


def layers_of(encoder: nn.Module) -> Iterator[nn.Module]:
    """The modules that an encoder repeats."""
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(layer) for layer in module}) == 1:
            yield from module


def keeps_words(encoder: nn.Module) -> bool:
    """Whether it keeps keys and values for words to come, as a language model that serves as an encoder does."""
    return "use_cache" in inspect.signature(type(encoder).forward).parameters


def reading(call: Call) -> Call:
    """`call`, which runs the encoder, without what is kept for words to come, unless that is asked for: there are none
    to come, and a layer that writes into it is another graph than the next one."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if len(args) <= 2 and "past_key_values" not in kwargs:
            kwargs.setdefault("use_cache", False)
        return call(*args, **kwargs)

    return run


def replayed_layer(layer: nn.Module, call: Call, replays: Replays) -> Call:
    """`call`, which runs an encoder's layer, by its recording where there can be one: of one tensor from tensors."""
    gives_one: dict[Hashable, bool] = {}

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors: list[Tensor] = []
        shape = _taken_apart((args, kwargs), tensors) if replays.works and is_recordable(layer) else None
        if shape is None or not tensors or not gives_one.get(shape, True):
            return call(*args, **kwargs)
        other: list[Any] = []

        def called(*given: Tensor) -> tuple[Tensor, ...]:
            found, named = _put_together(shape, iter(given))
            out = call(*found, **named)
            gives_one[shape] = isinstance(out, Tensor)
            if isinstance(out, Tensor):
                return (out,)
            other.append(out)
            return ()

        results = replays.run((layer, shape), _marks(layer), tuple(tensors), called)
        return results[0] if results else other[0]

    return run


def is_recordable(layer: nn.Module) -> bool:
    """Whether nothing but what it launches happens when it runs: no hook, no adapter, no other library's weights."""
    for part in layer.modules():
        if part.training or hooked(part):
            return False
        if type(part).__module__.startswith(("peft.", "bitsandbytes.")):
            return False
        if any(weight is not None and type(weight) is not nn.Parameter for weight in part._parameters.values()):
            return False
    return True


def _marks(layer: nn.Module) -> Hashable:
    """Where its weights lie."""
    lie: list[int] = []
    for part in layer.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            lie += [id(part)] if tensor is None else [id(part), tensor.data_ptr()]
    return tuple(lie)


def _taken_apart(value: Any, tensors: list[Tensor]) -> Hashable:
    """How it is built, its tensors put into the list; None when it holds anything that is not understood."""
    if type(value) is Tensor:
        tensors.append(value)
        return TENSOR
    if type(value) in (tuple, list, dict):
        inner = value.values() if type(value) is dict else value
        parts = tuple(_taken_apart(part, tensors) for part in inner)
        return None if None in parts else (type(value), tuple(value) if type(value) is dict else (), parts)
    return ("plain", type(value), value) if type(value) in PLAIN else None


def _put_together(shape: Any, tensors: Iterator[Tensor]) -> Any:
    """What was taken apart, with these tensors."""
    if shape == TENSOR:
        return next(tensors)
    kind, names, parts = shape
    if kind == "plain":
        return parts
    inner = [_put_together(part, tensors) for part in parts]
    return dict(zip(names, inner, strict=True)) if kind is dict else kind(inner)
