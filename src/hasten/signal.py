"""signal.py is what policies look at: distances between tensors, as numbers still on their device.

Nothing here waits for the device but `largest` and `on_its_way`'s results, so an evaluation synchronises at most once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hasten.kernels.on_device import on_device
from hasten.kernels.residual_sums import residual_sums


def relative_l1(now: Tensor, before: Tensor, *, relative_to: str = "previous") -> Tensor:
    """Mean |now - before| over mean |before| (or |now|), as a 0-dim float32 tensor; 0 when nothing moved.

    now, before: same shape (..., C) and dtype; sums are kept in float32. relative_to: "previous" or "current".
    Does not synchronise. Raises ValueError on unequal shapes.
    Source: First Block Cache, ParaAttention (2024); TeaCache (arXiv 2411.19108).
    """
    if now.shape != before.shape:
        raise ValueError(f"tensors of shapes {tuple(now.shape)} and {tuple(before.shape)} cannot be compared.")
    moved = mean_abs(now - before)
    scale = mean_abs(before if relative_to == "previous" else now)
    # 0 over 0 is no change; anything over 0 stays infinite and forces compute.
    return torch.where(moved == 0, torch.zeros_like(moved), moved / scale)


def residual_l1(image: Tensor, entry: Tensor, before: Tensor, *, relative_to: str = "previous") -> Tensor:
    """relative_l1 of image - entry, the difference rounded to their dtype, and before; all (B, N, C).

    On a GPU one pass over the three: 76 MB for FLUX.1 at 1024x1024 in bfloat16, 18 us at 4.2 TB/s.
    """
    found = residual_sums(image, entry, before, relative_to == "previous") if image.is_cuda else None
    return relative_l1(image - entry, before, relative_to=relative_to) if found is None else found


def half_cosine(now: Tensor, before: Tensor) -> Tensor:
    """(1 - cos) / 2 of the angle between two tensors taken as one long vector each; 0-dim float32, 0 to 1.

    now, before: same shape and dtype; sums are kept in float32. Two zero vectors are alike, zero and another are not.
    Does not synchronise. Raises ValueError on unequal shapes. Source: the Sana nodes of ComfyUI-Lightning 1.3.
    """
    if now.shape != before.shape:
        raise ValueError(f"tensors of shapes {tuple(now.shape)} and {tuple(before.shape)} cannot be compared.")
    one, other = now.flatten().float(), before.flatten().float()
    # Of their difference once both have length one: 1 - cos itself cancels to nothing below 1e-7 in float32.
    lengths = [torch.linalg.vector_norm(v) for v in (one, other)]
    apart = one / lengths[0].clamp_min(1e-30) - other / lengths[1].clamp_min(1e-30)
    quarter: Tensor = torch.linalg.vector_norm(apart).square() / 4
    return quarter


def mean_abs(x: Tensor) -> Tensor:
    """Mean |x| as a 0-dim float32 tensor, without synchronising."""
    return x.abs().mean(dtype=torch.float32)


def magnitude_ratio(now: Tensor, before: Tensor) -> Tensor:
    """Mean over tokens of |now| / |before|, the norms taken over channels; 0-dim float32, no synchronisation.

    now, before: (B, N, C). Source: MagCache (arXiv 2506.09045), its calibration.
    """
    norms = torch.linalg.vector_norm(now, dim=-1, dtype=torch.float32)
    ratio: Tensor = (norms / (torch.linalg.vector_norm(before, dim=-1, dtype=torch.float32) + 1e-8)).mean()
    return ratio


def largest(changes: Sequence[Tensor], meanwhile: Callable[[], None] | None = None) -> float:
    """The largest of some 0-dim tensors of one device, as a float; NaN when any is. Synchronises once.

    meanwhile: work to launch behind the changes, which a GPU does while the host waits for the number alone.
    """
    value = on_its_way(changes[0] if len(changes) == 1 else torch.stack(list(changes)).max())
    if meanwhile is not None:
        meanwhile()
    return value()


def on_its_way(number: Tensor, wait: Callable[[], None] | None = None) -> Callable[[], float]:
    """Has a 0-dim tensor's number brought to the host, and gives what waits for it and for nothing launched later.

    wait: waits for a mark that the caller sets right behind; one is set here if left out.
    """
    if number.device.type != "cuda":
        known = float(number)
        return lambda: known
    with on_device(number.device):
        there = torch.empty((), dtype=number.dtype, pin_memory=True)
        there.copy_(number, non_blocking=True)
        if wait is None:
            arrived = torch.cuda.Event()
            arrived.record()
            wait = arrived.synchronize
    waits = wait

    def value() -> float:
        waits()
        return float(there)

    return value
