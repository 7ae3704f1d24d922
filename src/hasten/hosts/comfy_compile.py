"""comfy_compile.py: torch.compile of a model's blocks, and weight-only quantisation of a VAE's copy, for ComfyUI.

Blocks alone are compiled, through ComfyUI's own wrapper, so that LoRAs keep their keys, gates stay outside the graph
and nothing shared is touched. Quantisation is for a copy of the VAE: the one that was loaded stays as it is.
"""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
from torch import nn

from hasten.compile import INDUCTOR, cannot_compile
from hasten.compile import backends as backends

BACKEND = INDUCTOR
STACKS = ("double_blocks", "single_blocks", "blocks", "transformer_blocks", "joint_blocks", "layers")


def block_keys(model: Any) -> list[str]:
    """The names of a model's transformer blocks, as ComfyUI addresses them; empty for a network without any."""
    network, keys, seen = model.model.diffusion_model, [], set()
    for name in STACKS:
        stack = getattr(network, name, None)
        # One stack may go by two names, as Sana's does.
        if isinstance(stack, nn.ModuleList) and id(stack) not in seen:
            seen.add(id(stack))
            keys += [f"diffusion_model.{name}.{index}" for index in range(len(stack))]
    return keys


def compile_blocks(
    model: Any, *, backend: str = BACKEND, dynamic: bool | None = True, fullgraph: bool = False
) -> tuple[Any, str]:
    """A clone of `model` with its blocks compiled at the first run, or as it is, and what to say on the node."""
    reason = cannot_compile(backend)
    keys = block_keys(model)
    if reason is None and not keys:
        reason = f"{type(model.model.diffusion_model).__name__} has no list of blocks, it is not compiled"
    if reason is not None:
        return model, reason
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = model.clone()
    set_torch_compile_wrapper(clone, backend=backend, keys=keys, dynamic=dynamic, fullgraph=fullgraph)
    return clone, f"{len(keys)} blocks are compiled as they first run ({backend})"


def quantise_vae(vae: Any) -> tuple[Any, str]:
    """A copy of `vae` with its linear layers' weights in 8 bits, or `vae` itself, and what to say on the node."""
    layers = [m for m in vae.first_stage_model.modules() if isinstance(m, nn.Linear)]
    if not layers:
        return vae, "this VAE has no linear layers, it is not quantised"
    if any(layer.weight.dtype.itemsize == 1 for layer in layers):
        return vae, "this VAE is quantised already"
    if importlib.util.find_spec("torchao") is None:
        return vae, "the package torchao is not installed, the VAE is not quantised"
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    fp8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    own = copy.copy(vae)
    own.first_stage_model = copy.deepcopy(vae.first_stage_model)
    patcher = vae.patcher
    own.patcher = type(patcher)(own.first_stage_model, patcher.load_device, patcher.offload_device)
    quantize_(own.first_stage_model, Float8WeightOnlyConfig() if fp8 else Int8WeightOnlyConfig())
    return own, f"{len(layers)} layers of the VAE's copy are kept in {'fp8' if fp8 else 'int8'}"
