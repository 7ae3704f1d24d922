"""attention_backends.py: every attention that may be at hand, its limits, and how to call it in one layout.

q, k, v: (B, H, N, D); so is what comes back. A back-end says in one sentence why it cannot take a call; whether its
numbers are right is attention.py's to test. Packages are imported where they are used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hasten.kernels.streams import Fused, Streams

HALF = (torch.float16, torch.bfloat16)

# Largest mean error over mean size against float32. 16 bits: their own rounding, twice; int8 scores with a 16-bit P V,
# and e4m3: what SageAttention's variants show on outlying keys, with room.
EXACT, INT8, FP8, SPARSE = 0.01, 0.03, 0.06, 1.0


@dataclass(frozen=True)
class Ask:
    """What a call is like. rows: queries, keys: keys; they differ in cross attention only."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    head_dim: int
    rows: int
    keys: int
    masked: bool = False

    @classmethod
    def of(cls, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Ask:
        """The ask of one call, q and k (B, H, N, D)."""
        return cls(q.device, q.dtype, q.shape[1], q.shape[3], q.shape[2], k.shape[2], mask is not None)


@dataclass(frozen=True)
class Verdict:
    """Whether a back-end takes a call, and the reason in words when it does not."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class Backend:
    """One attention. refuses: a reason or None; error: the bound that its self-test must stay under.

    fused: the same from before norm and rotation on, where it has that.
    """

    name: str
    words: str
    error: float
    refuses: Callable[[Ask], str | None]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    fused: Fused | None = None

    def supports(self, ask: Ask) -> Verdict:
        """The verdict on one call, from its shape and the machine alone."""
        reason = self.refuses(ask)
        return Verdict(reason is None, reason or "")


def _takes(
    *, capability: tuple[int, int] = (0, 0), dims: tuple[int, ...] = (), largest: int = 0, package: str = "",
    attribute: str = "", square: bool = False, least_rows: int = 1,
) -> Callable[[Ask], str | None]:  # fmt: skip
    """A rule: an NVIDIA GPU from `capability` on, half precision, these head sizes, no mask, and the package."""

    def refuses(ask: Ask) -> str | None:
        if ask.device.type != "cuda" or torch.version.cuda is None:
            return "needs an NVIDIA GPU"
        if package:
            missing = lacks(package, attribute)
            if missing:
                return missing
        has = torch.cuda.get_device_capability(ask.device)
        if has < capability:
            needed, found = (".".join(map(str, pair)) for pair in (capability, has))
            return f"needs compute capability {needed}, this GPU has {found}"
        return misfit(ask, dims=dims, largest=largest, square=square, least_rows=least_rows)

    return refuses


def misfit(ask: Ask, *, dims: tuple[int, ...], largest: int, square: bool, least_rows: int) -> str | None:
    """Why the call's own shape and dtype do not fit, or None."""
    if ask.masked:
        return "takes no mask"
    if ask.dtype not in HALF:
        return f"takes float16 and bfloat16, not {str(ask.dtype).removeprefix('torch.')}"
    if dims and ask.head_dim not in dims:
        return f"takes head sizes {' and '.join(map(str, dims))}, not {ask.head_dim}"
    if largest and (ask.head_dim > largest or ask.head_dim % 8):
        return f"takes head sizes up to {largest} in steps of 8, not {ask.head_dim}"
    if square and ask.rows != ask.keys:
        return "takes as many keys as queries"
    if ask.rows < least_rows:
        return f"takes {least_rows} tokens and more, not {ask.rows}"
    return None


@functools.cache
def lacks(package: str, attribute: str = "") -> str | None:
    """Why a package cannot be used, or None; it is really imported, once."""
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    try:
        module = importlib.import_module(package)
    except Exception as error:  # a package built for another torch fails in many ways
        return f"{package} cannot be imported ({type(error).__name__}: {error})".splitlines()[0]
    if attribute and not hasattr(module, attribute):
        return f"this {package} has no {attribute}"
    return None


def _kitchen_refuses(ask: Ask) -> str | None:
    reason = _takes(capability=(7, 5), largest=256, package="comfy_kitchen", attribute="int8_attention")(ask)
    available = (
        None if reason else getattr(importlib.import_module("comfy_kitchen"), "int8_attention_is_available", None)
    )
    if available is not None and not available(ask.device):
        return "this comfy_kitchen's compiled part does not take this GPU"
    return reason


def _sol_refuses(ask: Ask) -> str | None:
    reason = _takes(
        capability=(8, 0), dims=(128,), square=True, least_rows=128, package="comfy_kitchen", attribute="sol_attn"
    )(ask)
    available = None if reason else getattr(importlib.import_module("comfy_kitchen"), "sol_attn_is_available", None)
    if available is not None and not available(ask.device):
        return "this comfy_kitchen's compiled part does not take this GPU"
    return reason


def _ours(capability: tuple[int, int]) -> Callable[[Ask], str | None]:
    rule = _takes(capability=capability, dims=(64, 128), package="triton", square=True)
    return lambda ask: rule(ask) or (None if ask.heads * ask.rows < 2**31 // 128 else "the call is too long for it")


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v)


def _by_kernel(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, name)):
            return scaled_dot_product_attention(q, k, v)

    return attend


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flash = importlib.import_module("flash_attn_interface").flash_attn_func
    out = flash(*(t.transpose(1, 2) for t in (q, k, v)))
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found.transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _compiled_flex()(q, k, v)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = importlib.import_module("sageattention").sageattn(q, k, v, tensor_layout="HND", is_causal=False)
    return out


def _sparge(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    topk = importlib.import_module("spas_sage_attn").spas_sage2_attn_meansim_topk_cuda
    out: Tensor = topk(q, k, v, topk=0.5, is_causal=False)
    return out


def _kitchen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = importlib.import_module("comfy_kitchen").int8_attention(q, k, v)
    return out


def sol(keep: float, text_rows: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """comfy-kitchen's block-sparse attention that keeps a share of the blocks of 64 keys, the text always, and takes
    the others by their means."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if keep >= 1.0:  # its share is below 1
            return scaled_dot_product_attention(q, k, v)
        text = [0, (text_rows + 63) // 64]
        out: Tensor = importlib.import_module("comfy_kitchen").sol_attn(
            *(t.transpose(1, 2).contiguous() for t in (q, k, v)), topk_ratio=keep, sink_blocks=text, sink_q=text
        )
        return out.transpose(1, 2)

    return attend


def _int8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from hasten.kernels.attention8 import attention8

    return attention8(q, k, v, fp8=False)


def _int8_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from hasten.kernels.attention8 import attention8

    return attention8(q, k, v)


def _eight_fused(fp8: bool) -> Fused:
    def fused(streams: Streams, dtype: torch.dtype) -> Tensor:
        from hasten.kernels.attention8 import attend, on_device

        with on_device(streams.q):
            return attend(streams.eight(fp8=fp8), streams.v if fp8 else streams.values(), dtype)

    return fused


def compact(rows: int, text_rows: int, grid: tuple[int, int] | None, device: torch.device) -> Tensor | None:
    """The order of rows in which neighbours of the picture lie together; None where the grid is not the call's."""
    if grid is None or text_rows + grid[0] * grid[1] != rows:
        return None
    from hasten.kernels.curve import token_order

    return token_order(text_rows, *grid, device)


def sparse_fused(
    keep: float, text_rows: int, heads: tuple[Tensor, Tensor, Tensor] | None = None,
    grid: tuple[int, int] | None = None,
) -> Fused:  # fmt: skip
    """`sparse` from before norm and rotation on."""

    def fused(streams: Streams, dtype: torch.dtype) -> Tensor:
        from hasten.kernels.attention8 import attend_sparse, on_device

        q = streams.q
        tuned, alike, skip_below = heads or (_shares(q, keep), None, None)
        with on_device(q):
            order = compact(streams.rows, text_rows, grid, q.device)
            eight = streams.eight(fp8=True, means=True, alike=alike is not None, order=order)
            return attend_sparse(
                eight, streams.v, dtype, keep=tuned, alike=alike, skip_below=skip_below, topk=heads is None,
                text_rows=text_rows,
            )  # fmt: skip

    return fused


def _shares(q: Tensor, keep: float) -> Tensor:
    """keep for every head, filled on the device: a number copied from the host would have it wait."""
    return torch.full((q.shape[1],), keep, device=q.device)


def sparse(
    keep: float, text_rows: int, fp8: bool = True, heads: tuple[Tensor, Tensor, Tensor] | None = None,
    grid: tuple[int, int] | None = None,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:  # fmt: skip
    """Our block-sparse attention that keeps a share of the blocks of keys; the first `text_rows` are always on.

    heads: tuned settings instead, (H,) each: the weight to keep, how alike blocks must be, what may be skipped.
    grid: rows and columns of the picture's tokens, so that blocks are patches of it and no strips.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from hasten.kernels.attention8 import attention8_sparse

        order = compact(q.shape[2], text_rows, grid, q.device)
        if heads is not None:
            tuned, alike, skip_below = heads
            return attention8_sparse(
                q, k, v, keep=tuned, alike=alike, skip_below=skip_below, topk=False, text_rows=text_rows, fp8=fp8,
                order=order,
            )  # fmt: skip
        keeps = _shares(q, keep)
        return attention8_sparse(q, k, v, keep=keeps, alike=None, text_rows=text_rows, fp8=fp8, order=order)

    return attend


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("sdpa", "torch's own", EXACT, lambda ask: None, _sdpa),
        Backend("cudnn", "cuDNN's", EXACT, _takes(capability=(8, 0), largest=128), _by_kernel("CUDNN_ATTENTION")),
        Backend(
            "flash2", "FlashAttention 2", EXACT, _takes(capability=(8, 0), largest=256), _by_kernel("FLASH_ATTENTION")
        ),
        Backend(
            "flash3", "FlashAttention 3, its package", EXACT,
            _takes(capability=(9, 0), largest=256, package="flash_attn_interface", attribute="flash_attn_func"),
            _flash3,
        ),
        Backend("flex", "torch's, compiled", EXACT, _takes(capability=(7, 5), dims=(64, 128), package="triton"), _flex),
        Backend(
            "sage", "SageAttention, its package", FP8,
            _takes(dims=(64, 96, 128), package="sageattention", attribute="sageattn"), _sage,
        ),
        Backend("kitchen", "comfy-kitchen's int8", FP8, _kitchen_refuses, _kitchen),
        Backend("int8", "ours, int8 and 16 bits", INT8, _ours((7, 5)), _int8, _eight_fused(False)),
        Backend("int8_fp8", "ours, int8 and fp8", FP8, _ours((8, 9)), _int8_fp8, _eight_fused(True)),
        Backend(
            "sparge", "SpargeAttn, its package", SPARSE,
            _takes(
                capability=(8, 0), dims=(64, 128), least_rows=128, package="spas_sage_attn",
                attribute="spas_sage2_attn_meansim_topk_cuda",
            ),
            _sparge,
        ),
        Backend("sol", "comfy-kitchen's sol-attn, half of the blocks", SPARSE, _sol_refuses, sol(0.5, 0)),
        Backend("sparse", "ours, half of the blocks", SPARSE, _ours((8, 9)), sparse(0.5, 0), sparse_fused(0.5, 0)),
    )
}  # fmt: skip

# What `auto` chooses among: those whose result is the whole sum.
DENSE = tuple(name for name, backend in BACKENDS.items() if backend.error < SPARSE)
