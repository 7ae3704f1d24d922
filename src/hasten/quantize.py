"""quantize.py keeps a model's linear layers in 8 bits: once, module by module, so that both copies never stand side
by side on the device.

Weights have a scale for each output, activations one for each row, found as they come. It knows layers, not families:
which ones are quantised is said by the host's list of names, and by the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hasten.kernels.linear import FP8, linear_rows_8
from hasten.kernels.rows import quantise, split_streams

FORMATS = {"fp8": FP8, "int8": torch.int8}
SAVED_AS = {"weight8": "weight", "scale8": "weight_scale"}
FP8_SINCE = (8, 9)  # compute capability: Ada and newer multiply in fp8


def format_for(wanted: str, device: torch.device) -> str:
    """ "fp8" or "int8": what is meant by `wanted` ("auto" too) on that device.

    Raises ValueError in one sentence for a format that the device does not multiply in.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        has_fp8 = capability >= FP8_SINCE and torch.version.hip is None
        name = f"{torch.cuda.get_device_name(device)}, {capability[0]}.{capability[1]}"
    elif device.type == "cpu":
        has_fp8, name = False, "a CPU"
    else:
        raise ValueError(
            f'quantize.format is {wanted}, and layers in 8 bits are for NVIDIA GPUs and CPUs, not for "{device.type}": '
            "leave [quantize] out here."
        )
    if wanted == "fp8" and not has_fp8:
        raise ValueError(
            "quantize.format is fp8, which needs an NVIDIA GPU of compute capability 8.9 or newer, and this is "
            f'{name}: set format = "auto" or "int8".'
        )
    return "fp8" if has_fp8 and wanted in ("fp8", "auto") else "int8"


def linear_8(x: Tensor, weight8: Tensor, scale8: Tensor, bias: Tensor) -> Tensor:
    """x (..., K) in 16 or 32 bits through a layer in 8 bits: (..., O) of x's dtype.

    weight8 (O, K) float8 or int8, scale8 (O) float32, bias (O); each row of x gets its own scale.
    """
    flat = x.reshape(-1, weight8.shape[1])
    if torch.compiler.is_compiling():  # the compiler joins this with what made x
        rows, scales = quantise(flat, weight8.dtype)
    else:
        rows, scales = split_streams(flat[None], 0, dtype=weight8.dtype)
    out: Tensor = linear_rows_8(rows, scales, 0, (), [(weight8, scale8, bias)], x.dtype).unflatten(0, x.shape[:-1])
    return out


class ReadOnly(Tensor):
    """A tensor that refuses to be written into: it is a copy, and what is written would be lost unseen."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any function of torch but those that write."""
        name = func.__name__
        if (name.endswith("_") and not name.endswith("__")) or name in ("__iadd__", "__isub__", "__imul__", "__set__"):
            raise ValueError(
                "this layer keeps its weight in 8 bits, into which nothing is merged: merge a LoRA before quantising, "
                "or leave it beside the layer (no fuse_lora)."
            )
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        return out.as_subclass(cls) if func is Tensor.data.__get__ else out  # type: ignore[attr-defined]


class Linear8(nn.Linear):
    """A linear layer whose weight is kept in 8 bits with one scale for each output.

    weight8 (O, K) float8 or int8, scale8 (O) float32, bias (O) in the layer's 16-bit dtype. It is an nn.Linear so that
    adapters (LoRA) find it; they stay beside it.
    """

    weight8: Tensor
    scale8: Tensor

    def __init__(self, weight8: Tensor, scale8: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight8.shape
        self.dtype = dtype
        self.register_buffer("weight8", weight8)
        self.register_buffer("scale8", scale8)
        zeros = torch.zeros(self.out_features, dtype=dtype, device=weight8.device)
        self.bias = nn.Parameter(zeros if bias is None else bias.detach(), requires_grad=False)

    @classmethod
    def of(cls, layer: nn.Linear, dtype: torch.dtype, device: torch.device | None = None) -> Linear8:
        """The layer's weight, brought to `device` and quantised there."""
        weight = layer.weight.detach().to(device or layer.weight.device)
        weight8, scales = quantise(weight, dtype)
        bias = None if layer.bias is None else layer.bias.detach().to(weight.device)
        return cls(weight8, scales.flatten(), bias, layer.weight.dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight in the layer's dtype again, (O, K), a new tensor each time: to be read only."""
        return (self.weight8.float() * self.scale8[:, None]).to(self.dtype).as_subclass(ReadOnly)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """weight8, scale8 and bias."""
        return self.weight8, self.scale8, self.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) in 16 or 32 bits to (..., O) of x's dtype."""
        return linear_8(x, *self.tensors())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear8:
        """Module.to and its like: 8 bits stay 8 bits and scales float32, whatever dtype the model is cast to."""
        weight8, scale8 = self.weight8, self.scale8
        nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call, unused-ignore]
        if self.weight8.dtype != weight8.dtype:
            self.weight8 = weight8.to(self.bias.device)
        if self.scale8.dtype != scale8.dtype:
            self.scale8 = scale8.to(self.bias.device)
        self.dtype = self.bias.dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """weight (8 bits), weight_scale and bias: LoRA loaders look for a weight under its name."""
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call, unused-ignore]
        for ours, theirs in SAVED_AS.items():
            destination[prefix + theirs] = destination.pop(prefix + ours)

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        for ours, theirs in SAVED_AS.items():
            if prefix + theirs in state:
                state[prefix + ours] = state.pop(prefix + theirs)
        super()._load_from_state_dict(state, prefix, *args)  # type: ignore[no-untyped-call, unused-ignore]

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.in_features}, {self.out_features}, weight={str(self.weight8.dtype).removeprefix('torch.')}"


class Quantised:
    """Linear layers of some modules, replaced one after the other by Linear8, and how to have them back."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        dtype: torch.dtype,
        *,
        wanted: Callable[[str], bool],
        keep: bool,
        device: torch.device | None = None,
    ) -> None:
        self._modules = list(modules)
        self._kept: list[tuple[Linear8, nn.Linear]] = []
        self.keeps = keep
        self.layers = 0
        try:
            for module in modules:
                for parent, name, layer in list(_linear_layers(module, wanted)):
                    eight = Linear8.of(layer, dtype, device)
                    setattr(parent, name, eight)
                    self.layers += 1
                    if keep:
                        self._kept.append((eight, layer.to("cpu")))
        except BaseException:  # out of memory half way, or interrupted
            if keep:
                self.undo()
            raise

    def undo(self) -> None:
        """Puts the original layers back, on the device that the quantised ones are on.

        Raises ValueError, before anything is changed, when they were not kept.
        """
        if self.layers and not self.keeps:
            raise ValueError(
                "the original weights were not kept (quantize.keep is false), so the 8-bit ones stay: load the model "
                "again, or quantise with keep = true."
            )
        kept = {id(eight): (eight, layer) for eight, layer in self._kept}
        for module in self._modules:
            for parent in list(module.modules()):
                # Looked for anew: an adapter (LoRA) that came or went since has moved the layer to another parent.
                for name, child in list(parent.named_children()):
                    if id(child) in kept:
                        eight, layer = kept[id(child)]
                        setattr(parent, name, layer.to(eight.weight8.device))
        self._kept.clear()


def _linear_layers(module: nn.Module, wanted: Callable[[str], bool]) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Parent, name and layer of the plain linear layers whose dotted name is wanted."""
    for path, found in module.named_modules():
        if type(found) is nn.Linear and wanted(path):
            parent, _, name = path.rpartition(".")
            yield module.get_submodule(parent), name, found
