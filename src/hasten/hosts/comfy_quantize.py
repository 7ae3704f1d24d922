"""comfy_quantize.py keeps a FLUX's or a Sana's linear layers in 8 bits, for one clone of a ComfyUI MODEL.

The layers hang on the clone as object patches: ComfyUI puts them in when it loads the clone, and takes them out again
for every other. The model's own layers are never written to, and stay off the GPU while the clone is on it.

LoRAs, before the node or after it, are ComfyUI's own patches of a weight by its name: it asks a layer in 8 bits for the
numbers that its weight stands for, and hands them back changed.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hasten.kernels.rows import LIMITS, quantise
from hasten.quantize import FORMATS, format_for, linear_8

NOTHING = "this model has no layers to quantise: a FLUX or a Sana in 16 or 32 bits is expected"
# Attention and MLPs; modulation stays: it sees one row a picture, and its error falls on every token.
PARTS = ("img_attn.", "img_mlp.", "txt_attn.", "txt_mlp.", "linear1", "linear2", "attn1.", "attn2.")


class Layer8(nn.Module):
    """A linear layer in 8 bits as ComfyUI's patcher takes one: `convert_weight` and `set_weight` beside its weight.

    weight (O, K) float8 or int8, scale (O) float32: one for each output, which stays when a LoRA changes the weight, so
    that ComfyUI can put the weight back alone.
    """

    scale: Tensor

    def __init__(self, weight8: Tensor, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight8.shape
        self.weight = nn.Parameter(weight8, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, layer: nn.Linear, weight: Tensor, dtype: torch.dtype, device: torch.device) -> Layer8:
        """The layer with `weight`, quantised on `device`, kept where the layer is."""
        weight8, scales = quantise(weight.to(device), dtype)
        at = layer.weight.device
        bias = torch.zeros(len(weight), dtype=weight.dtype) if layer.bias is None else layer.bias.detach().clone()
        return cls(weight8.to(at), scales.flatten().to(at), bias.to(at))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., O) of x's dtype."""
        return linear_8(x, self.weight, self.scale, self.bias)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """The numbers that a weight of this layer stands for."""
        return weight * self.scale.to(weight.device, weight.dtype)[:, None]

    def set_weight(
        self, out_weight: Tensor, inplace_update: bool = False, seed: Any = None, return_weight: bool = False,
        **kwargs: Any,
    ) -> Tensor | None:  # fmt: skip
        """Takes such numbers back in 8 bits; what is larger than the scale allows becomes the largest."""
        dtype = self.weight.dtype
        limit = LIMITS[dtype]
        weight8 = (out_weight.float() / self.scale.to(out_weight.device)[:, None]).clamp(-limit, limit)
        weight8 = (weight8.round() if dtype == torch.int8 else weight8).to(dtype)
        if return_weight:
            return weight8
        if inplace_update:
            self.weight.data.copy_(weight8)
        else:
            self.weight = nn.Parameter(weight8, requires_grad=False)
        return None


def quantise_model(model: Any) -> tuple[Any, str]:
    """A clone of `model` with its blocks' layers in fp8 or int8, or `model` itself, and what to say on the node."""
    try:
        bits = format_for("auto", torch.device(model.load_device))
    except ValueError as reason:
        return model, str(reason).rstrip(".")
    clone, layers, saved = model.clone(), 0, 0
    for name, layer in _layers(model):
        eight = _in_8_bits(model, name, layer, bits)
        clone.add_object_patch(name, eight)
        layers, saved = layers + 1, saved + _saved(layer)
    if not layers:
        return model, NOTHING
    # ComfyUI takes a clone with the same id for the same weights, and would leave a LoRA of the model in place.
    clone.patches_uuid = uuid.uuid4()
    _compute_hooks_anew(clone)
    clone.size = max(model.model_size() - saved, 1)
    return clone, f"{layers} layers of the model are kept in {bits}"


def quantise_for_good(model: Any, wanted: str = "auto") -> str:
    """Puts layers in 8 bits in the place of a model's own that was just loaded and is nobody else's yet.

    One layer after the other, so that both copies never stand side by side. wanted: "auto", "fp8" or "int8". Gives what
    to say on the node. Raises ValueError for a format that the device lacks, before anything is changed.
    """
    bits, layers = format_for(wanted, torch.device(model.load_device)), 0
    for name, layer in _layers(model):
        parent, _, last = name.rpartition(".")
        setattr(model.model.get_submodule(parent), last, _in_8_bits(model, name, layer, bits))
        layers += 1
    model.size = 0  # counted anew when it is asked for
    _compute_hooks_anew(model)
    return f"{layers} layers of the model are kept in {bits}" if layers else NOTHING


def _in_8_bits(model: Any, name: str, layer: nn.Linear, bits: str) -> Layer8:
    weight = layer.weight.detach()
    backup = model.backup.get(f"{name}.weight")  # the model is on its device now, with a LoRA in this weight
    if backup is not None:
        weight = getattr(backup, "weight", backup)
    return Layer8.of(layer, weight, FORMATS[bits], torch.device(model.load_device))


def _compute_hooks_anew(model: Any) -> None:
    """LoRAs of single conditions: what ComfyUI keeps of them for the next step, it would copy into the 8 bits as it is,
    past `set_weight`."""
    model.hook_mode = type(model.hook_mode).MinVram


def _saved(layer: nn.Linear) -> int:
    """Bytes that a layer in 8 bits takes less."""
    return layer.weight.numel() * (layer.weight.element_size() - 1)


def _layers(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """Name and layer of what is quantised; layers that hold 8 bits already are left as they are."""
    network = model.model.diffusion_model
    # Sana's go by two names; the weights', and so a LoRA's, is the first.
    for stack in (
        ("transformer_blocks",) if hasattr(network, "transformer_blocks") else ("double_blocks", "single_blocks")
    ):
        for i, block in enumerate(getattr(network, stack, ())):
            for inner in [inner for inner, _ in block.named_modules()]:
                if inner.startswith(PARTS):
                    name = f"diffusion_model.{stack}.{i}.{inner}"
                    layer = model.get_model_object(name)
                    if isinstance(layer, nn.Linear) and _is_plain(layer.weight):
                        yield name, layer


def _is_plain(weight: Any) -> bool:
    """Whether it is an ordinary weight of more than 8 bits."""
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() > 1
