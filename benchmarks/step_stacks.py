"""The stacks that flux_dev_step.py measures: each changes a model in place and gives back how to count its graphs.

They know nothing of sizes, times or files. On a CPU fp8 is played by int8, and cuDNN's attention by the usual one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def unique_graphs() -> Callable[[], int]:
    """Counts what torch compiled since now."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    return lambda: counters["stats"]["unique_graphs"] - before


def cudnn(model: Any) -> None:
    """cuDNN's attention, the fastest in 16 bits on Hopper; off a GPU the usual one."""
    if model.device.type == "cuda":
        model.set_attention_backend("_native_cudnn")


def eager(model: Any) -> Callable[[], int]:
    return unique_graphs()


def eager_cudnn(model: Any) -> Callable[[], int]:
    cudnn(model)
    return unique_graphs()


def compile_whole(model: Any) -> Callable[[], int]:
    cudnn(model)
    model.compile()
    return unique_graphs()


def compile_regional(model: Any) -> Callable[[], int]:
    cudnn(model)
    model.compile_repeated_blocks(fullgraph=True)
    return unique_graphs()


def torchao_fp8(model: Any, *, tuned: bool = False) -> Callable[[], int]:
    """torchao's row-wise fp8, blocks compiled.

    tuned: with its settings for inductor, which try every kernel's launches out (two minutes) and stay set.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    from hasten.hosts.diffusers_stack import QUANTISED

    def wanted(module: Any, path: str) -> bool:
        _, _, inside = path.partition("transformer_blocks.")
        return isinstance(module, torch.nn.Linear) and inside.partition(".")[2].startswith(QUANTISED)

    cudnn(model)
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=tuned)
    quantize_(model, config, filter_fn=wanted)
    model.compile_repeated_blocks(fullgraph=True)
    return unique_graphs()


class KitchenLinear(torch.nn.Module):
    """A linear layer in comfy-kitchen's int8: weights by rows, activations by rows as they come."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        import comfy_kitchen

        self.multiply, self.bias = comfy_kitchen.int8_linear, layer.bias
        self.weight, self.scale = comfy_kitchen.quantize_int8_rowwise(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight, self.scale, self.bias, out_dtype=x.dtype)


def kitchen_int8(model: Any) -> Callable[[], int]:
    """Every layer that ours quantises too; not compiled, as in ComfyUI, for its calls are no operations of torch."""
    from hasten.hosts.diffusers_stack import QUANTISED, blocks_of

    cudnn(model)
    for block in blocks_of(model):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, torch.nn.Linear) and name.startswith(QUANTISED):
                parent, _, last = name.rpartition(".")
                setattr(block.get_submodule(parent), last, KitchenLinear(layer))
    return unique_graphs()


def ours(
    bits: str | None = None,
    *,
    compiled: bool = True,
    fuse: bool = True,
    graph: str = "auto",
    attention: str = "",
) -> Callable[[Any], Callable[[], int]]:
    """Our stack: fused passes, 16 bits or fp8, regional compile, launches replayed."""

    def stack(model: Any) -> Callable[[], int]:
        from hasten.hosts.diffusers_stack import Stack
        from hasten.sections import Compile, Quantize

        cudnn(model)
        how = Compile(blocks=compiled, fuse="always" if fuse else "never", cuda_graph=graph)
        wanted = bits if bits is None or model.device.type == "cuda" else "int8"  # a CPU, to try it out, has no fp8
        done = Stack(model, how, Quantize(format=wanted or "none", keep=False))
        if attention:
            from hasten.hosts.diffusers_attention import HungAttention
            from hasten.hosts.diffusers_stack import blocks_of
            from hasten.recipe import Attention

            HungAttention(blocks_of(model), Attention(backend=attention))

        def graphs() -> int:
            for note in done.notes:
                print(note)
            if done.replays is not None:
                print(f"  recordings {done.replays.bytes / 2**20:.0f} MiB")
            return done.graphs

        return graphs

    return stack


# In the order of their worth: what comes late may not be reached within a budget.
STACKS: dict[str, Callable[[Any], Callable[[], int]]] = {
    "regional": compile_regional,
    "ours-bf16": ours(),
    "ours-fp8": ours("fp8"),
    "ours-fp8-int8": ours("fp8", attention="int8_fp8"),
    "torchao-fp8": torchao_fp8,
    "eager": eager,
    "kitchen-int8": kitchen_int8,
    "ours-bf16-int8": ours(attention="int8_fp8"),
    "whole": compile_whole,  # compiles for minutes
    "eager-cudnn": eager_cudnn,
    "ours-fp8-unfused": ours("fp8", fuse=False),
    "ours-bf16-launched": ours(graph="never"),
    "ours-fp8-launched": ours("fp8", graph="never"),
    "ours-fp8-uncompiled": ours("fp8", compiled=False, graph="always"),
    "torchao-fp8-tuned": functools.partial(torchao_fp8, tuned=True),
}
# Measured at every size; the others at the first alone.
MAIN = ("regional", "ours-bf16", "ours-fp8", "ours-fp8-int8")
