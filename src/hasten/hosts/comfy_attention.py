"""comfy_attention.py chooses a model's attention in ComfyUI, by its `optimized_attention_override`, per model.

One override is all that ComfyUI has room for, so ours is chained: what it cannot take (a mask, a head size, a device)
goes to the one that was there before, or to ComfyUI's own. Nothing of torch or ComfyUI is changed but for fast_math,
whose settings last as long as one sampling run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hasten.attention import CHAINS, CHOICES, Attention
from hasten.attention_backends import BACKENDS, Ask
from hasten.hosts.comfy_lines import counted
from hasten.hosts.comfy_options import APPLY_MODEL, ATTENTION, OUTER_SAMPLE

SLOT = "optimized_attention_override"
FAST_MATH = "hasten_fast_math"
GRID = "hasten_grid"

# FLUX's usual text, where the host does not tell how many leading tokens are text.
TEXT_ROWS = 512

# What each node's word asks of the registry: the original node wants 8 bits, with or without the package.
WISHES = {"sageattention": "sage8"}


def available(backend: str) -> str | None:
    """Why a back-end cannot be used here, in a sentence without its full stop, or None when it can."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # FLUX at 1024x1024; a call that is unlike it may still be refused, and says so when it comes.
    ask = Ask(device, torch.bfloat16, 24, 128, 4608, 4608)
    wish = WISHES.get(backend, backend)
    reasons = [BACKENDS[name].supports(ask).reason for name in CHAINS.get(wish, (wish,))]
    if all(reasons):
        reason = next((r for r in reasons if r.startswith("needs")), reasons[0])
        backend = "8-bit" if wish in CHAINS and backend != wish else backend
        reason = f"{backend} attention {reason}" if reason.startswith(("needs", "takes")) else reason
        return reason
    core = sys.modules.get("comfy.ldm.modules.attention")
    if core is not None and not hasattr(core, "wrap_attn"):
        return "this ComfyUI takes no other attention (0.3.60 and newer do)"
    return None


def choices() -> list[str]:
    """The back-ends that the node offers, whether or not they work here."""
    return list(CHOICES)


def put_attention(model: Any, backend: str) -> Any:
    """A clone of `model` that attends with `backend`; one of ours from before is replaced, another's is kept behind."""
    clone = without_names(model)
    to = clone.model_options.setdefault("transformer_options", {})
    found = to.get(SLOT)
    found = getattr(found, "hasten_found", found)
    to[SLOT] = override(backend, found)
    to[ATTENTION] = backend
    tell_grid(clone, [to[SLOT].hasten_attention] if backend == "sparse" else [])
    return clone


def tell_grid(clone: Any, attentions: Iterable[Attention]) -> None:
    """Has each call of the model tell these how many rows and columns of tokens its picture is, patches of 2 x 2."""
    clone.remove_wrappers_with_key(APPLY_MODEL, GRID)
    told = list(attentions)

    def applying(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for attention in told:
            attention.grid = (x.shape[-2] + 1) // 2, (x.shape[-1] + 1) // 2
        return executor(x, *args, **kwargs)

    if told:
        clone.add_wrapper_with_key(APPLY_MODEL, GRID, applying)


def without_names(model: Any) -> Any:
    """A clone of `model` whose blocks tell their attention no more whose it is, see comfy_sparge.py."""
    clone = model.clone()
    to = clone.model_options.get("transformer_options", {})
    dit = to.get("patches_replace", {}).get("dit", {})
    if any(hasattr(patch, "hasten_before") for patch in dit.values()):
        kept = {key: getattr(patch, "hasten_before", patch) for key, patch in dit.items()}
        kept = {key: patch for key, patch in kept.items() if patch is not None}
        # As ComfyUI's own nodes do: dicts of its own for this clone.
        to["patches_replace"] = {**to["patches_replace"], "dit": kept}
    return clone


def drop_attention(model: Any) -> Any:
    """A clone of `model` without an override of ours."""
    clone = without_names(model)
    tell_grid(clone, [])
    to = clone.model_options.setdefault("transformer_options", {})
    if hasattr(to.get(SLOT), "hasten_found"):
        found = to.pop(SLOT).hasten_found
        to.pop(ATTENTION, None)
        if found is not None:
            to[SLOT] = found
    return clone


def override(backend: str, found: Callable[..., Any] | None) -> Callable[..., Any]:
    """An override in ComfyUI's form; `found` is asked for what this one does not take."""
    said: list[str] = []
    attention = Attention(WISHES.get(backend, backend), say=said.append)

    def overriding(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        q, heads = args[0], args[3] if len(args) > 3 else kwargs["heads"]
        mask = args[4] if len(args) > 4 else kwargs.get("mask")
        separate = kwargs.get("skip_reshape", False)
        q, k, v = args[:3]
        # ComfyUI's own does the same with heads side by side; the views cost nothing where the call is not taken.
        if not separate:
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        plain = mask is None and kwargs.get("scale") is None and q.shape[1] == k.shape[1]
        takes_it = plain and _takes(attention, q, k, kwargs)
        used = "" if torch.compiler.is_compiling() or not takes_it else attention.choose(Ask.of(q, k)).name
        counted(kwargs, takes_it, used, said)
        if not takes_it:
            return func(*args, **kwargs) if found is None else found(func, *args, **kwargs)
        out = attention(q, k, v)
        return out if kwargs.get("skip_output_reshape", False) else out.transpose(1, 2).flatten(2)

    overriding.hasten_found = found  # type: ignore[attr-defined]
    overriding.hasten_attention = attention  # type: ignore[attr-defined]
    return overriding


def _takes(attention: Attention, q: Tensor, k: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether the wish can be met for this call; inside compiled code the registry answers that as it runs."""
    if torch.compiler.is_compiling():
        return True
    image = (kwargs.get("transformer_options") or {}).get("img_slice")
    attention.text_rows = TEXT_ROWS if image is None else int(image[0])
    return attention.fits(Ask.of(q, k))


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
