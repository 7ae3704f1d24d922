"""comfy_attention.py chooses a model's attention in ComfyUI, by its `optimized_attention_override`, per model.

One override is all that ComfyUI has room for, so ours is chained: what it cannot take (a mask, a head size, a device)
goes to the one that was there before, or to ComfyUI's own. Nothing of torch or ComfyUI is changed but for fast_math,
whose settings last as long as one sampling run.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hasten.hosts.comfy import ATTENTION, OUTER_SAMPLE
from hasten.hosts.comfy_lines import counted

SLOT = "optimized_attention_override"
FAST_MATH = "hasten_fast_math"

# What sageattention's kernels take (its README; other head sizes raise inside it).
SAGE_HEADS = (64, 96, 128)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def available(backend: str) -> str | None:
    """Why a back-end cannot be used here, in a sentence without its full stop, or None when it can."""
    if backend == "sage" and importlib.util.find_spec("sageattention") is None:
        return "the package sageattention is not installed, attention is left as it is"
    if backend in ("sage", "cudnn") and not torch.cuda.is_available():
        return f"{backend} attention needs an NVIDIA GPU, attention is left as it is"
    core = sys.modules.get("comfy.ldm.modules.attention")
    if core is not None and not hasattr(core, "wrap_attn"):
        return "this ComfyUI takes no other attention (0.3.60 and newer do), attention is left as it is"
    return None


def choices() -> list[str]:
    """The back-ends that the node offers, whether or not they work here."""
    return ["sdpa", "cudnn", "sage"]


def put_attention(model: Any, backend: str) -> Any:
    """A clone of `model` that attends with `backend`; one of ours from before is replaced, another's is kept behind."""
    clone = model.clone()
    to = clone.model_options.setdefault("transformer_options", {})
    found = to.get(SLOT)
    found = getattr(found, "hasten_found", found)
    to[SLOT] = override(backend, found)
    to[ATTENTION] = backend
    return clone


def drop_attention(model: Any) -> Any:
    """A clone of `model` without an override of ours."""
    clone = model.clone()
    to = clone.model_options.setdefault("transformer_options", {})
    if hasattr(to.get(SLOT), "hasten_found"):
        found = to.pop(SLOT).hasten_found
        to.pop(ATTENTION, None)
        if found is not None:
            to[SLOT] = found
    return clone


def override(backend: str, found: Callable[..., Any] | None) -> Callable[..., Any]:
    """An override in ComfyUI's form; `found` is asked for what this one does not take."""
    attend = {"sdpa": _sdpa, "cudnn": _cudnn, "sage": _sage}[backend]
    takes = {"sdpa": _any_shape, "cudnn": _on_gpu, "sage": _for_sage}[backend]

    def overriding(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        q, heads = args[0], args[3] if len(args) > 3 else kwargs["heads"]
        mask = args[4] if len(args) > 4 else kwargs.get("mask")
        separate = kwargs.get("skip_reshape", False)
        head_dim = q.shape[-1] if separate else q.shape[-1] // heads
        takes_it = mask is None and takes(q, head_dim)
        counted(kwargs, takes_it)
        if not takes_it:
            return func(*args, **kwargs) if found is None else found(func, *args, **kwargs)
        q, k, v = args[:3]
        if not separate:
            q, k, v = (t.reshape(t.shape[0], t.shape[1], heads, head_dim).transpose(1, 2) for t in (q, k, v))
        out = attend(q, k, v)
        return out if kwargs.get("skip_output_reshape", False) else out.transpose(1, 2).flatten(2)

    overriding.hasten_found = found  # type: ignore[attr-defined]
    return overriding


def _any_shape(q: Tensor, head_dim: int) -> bool:
    return True


def _on_gpu(q: Tensor, head_dim: int) -> bool:
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and head_dim <= 128 and head_dim % 8 == 0


def _for_sage(q: Tensor, head_dim: int) -> bool:
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and head_dim in SAGE_HEADS


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn

    out: Tensor = sageattn(q, k, v, tensor_layout="HND", is_causal=False)
    return out


def put_fast_math(model: Any, precision: str) -> Any:
    """A clone of `model` whose sampling runs use TF32 and cuDNN's search for the fastest kernel, and only they."""
    clone = without_fast_math(model)

    def sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with fast_math(precision):
            return executor(*args, **kwargs)

    clone.add_wrapper_with_key(OUTER_SAMPLE, FAST_MATH, sampling)
    return clone


def without_fast_math(model: Any) -> Any:
    """A clone of `model` that leaves torch's settings alone."""
    clone = model.clone()
    clone.remove_wrappers_with_key(OUTER_SAMPLE, FAST_MATH)
    return clone


@contextmanager
def fast_math(precision: str) -> Iterator[None]:
    """torch's float32 products at `precision` ("high": TF32, "medium": bfloat16) while it lasts; restored after it."""
    cudnn = torch.backends.cudnn
    before = (torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.benchmark_limit)
    torch.set_float32_matmul_precision(precision)
    # 20 kernels tried for each shape: the original node's limit.
    cudnn.allow_tf32, cudnn.benchmark, cudnn.benchmark_limit = True, True, 20
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.benchmark, cudnn.benchmark_limit = before[1:]
