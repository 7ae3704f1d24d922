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
        """The weight in the layer's dtype again, (O, K), a new tensor each time."""
        with torch.inference_mode():  # what is written into it would be lost: torch refuses that on such a tensor
            return (self.weight8.float() * self.scale8[:, None]).to(self.dtype)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """weight8, scale8 and bias."""
        return self.weight8, self.scale8, self.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) in 16 or 32 bits to (..., O) of x's dtype."""
        flat = x.reshape(-1, self.in_features)
        if torch.compiler.is_compiling():  # the compiler joins this with what made x
            rows, scales = quantise(flat, self.weight8.dtype)
        else:
            rows, scales = split_streams(flat[None], 0, dtype=self.weight8.dtype)
        out: Tensor = linear_rows_8(rows, scales, 0, (), [self.tensors()], x.dtype).unflatten(0, x.shape[:-1])
        return out

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
        self._kept: list[tuple[nn.Module, str, nn.Linear]] = []
        self.layers = 0
        for module in modules:
            for parent, name, layer in list(_linear_layers(module, wanted)):
                setattr(parent, name, Linear8.of(layer, dtype, device))
                self.layers += 1
                if keep:
                    self._kept.append((parent, name, layer.to("cpu")))

    def undo(self) -> None:
        """Puts the original layers back, on the device that the quantised ones are on."""
        for parent, name, layer in self._kept:
            now: Any = getattr(parent, name)
            setattr(parent, name, layer.to(now.weight8.device))
        self._kept.clear()


def _linear_layers(module: nn.Module, wanted: Callable[[str], bool]) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Parent, name and layer of the plain linear layers whose dotted name is wanted."""
    for path, found in module.named_modules():
        if type(found) is nn.Linear and wanted(path):
            parent, _, name = path.rpartition(".")
            yield module.get_submodule(parent), name, found
