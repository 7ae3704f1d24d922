"""Kernels compiled for compute capability 9.0 as their launches would go out; no GPU is needed."""

from __future__ import annotations

from typing import Any

import torch

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.int32: "*i32",
}


def compile_for_hopper(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], *, gluon: bool = False) -> Any:
    """The kernel compiled as its launcher would on a GPU of compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if hasattr(value, "block_shape"):
            element = TYPES[value.base.dtype][1:]
            signature[name], whole = f"tensordesc<{element}{list(value.block_shape)},{value.layout!r}>", False
        elif isinstance(value, torch.Tensor):
            signature[name], whole = TYPES[value.dtype], True
        elif isinstance(value, float):
            signature[name], whole = "fp32", False
        elif value == 1 and name not in getattr(kernel, "do_not_specialize", ()):
            signature[name], constants[name], whole = "constexpr", 1, False
        else:
            signature[name], whole = "i32", value % 16 == 0
        if whole:
            attributes[(i,)] = [["tt.divisibility", 16]]
    how = {name: value for name, value in options.items() if name not in kernel.arg_names}
    for name in kernel.arg_names[len(args) :]:
        signature[name], constants[name] = "constexpr", options[name]
    form: Any = ASTSource
    if gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as form
    return triton.compile(form(kernel, signature, constants, attributes), target=GPUTarget("cuda", 90, 32), options=how)
