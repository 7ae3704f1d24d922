"""Which device and which number format are used, and whether they work here: they are tried, not looked up."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}


def pick_device(wanted: str) -> Any:
    """The torch.device: "auto" is cuda, then mps, then cpu. Raises ValueError for one that is not here."""
    import torch

    here = ["cpu"]
    if torch.backends.mps.is_available():
        here.insert(0, "mps")
    if torch.cuda.is_available():
        here = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *here]
    if wanted == "auto":
        return torch.device(here[0])
    if wanted not in here:
        raise ValueError(f"there is no device {wanted!r} here: choose auto or {', '.join(here)}; see `hasten doctor`.")
    return torch.device(wanted)


def pick_dtype(wanted: str, device: Any) -> Any:
    """The torch.dtype: "auto" is bfloat16 on a GPU that computes in it, float16 on other GPUs, float32 on a CPU.

    Raises ValueError for an unknown one, or one that the device cannot multiply in.
    """
    import torch

    if wanted == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if dtype_works(torch.bfloat16, device) is None else torch.float16
    if wanted not in DTYPES:
        raise ValueError(f"there is no dtype {wanted!r}: choose auto, float32, bfloat16 or float16.")
    dtype = getattr(torch, DTYPES[wanted])
    reason = dtype_works(dtype, device)
    if reason is not None:
        raise ValueError(f"{DTYPES[wanted]} does not work on {device} ({reason}): try --dtype float32.")
    return dtype


def use_threads(count: int | None) -> None:
    """Has torch compute on that many CPU threads from now on; None leaves its own choice."""
    import torch

    if count is not None:
        torch.set_num_threads(count)


def dtype_works(dtype: Any, device: Any) -> str | None:
    """None when a small product comes out right on the device, else the reason; it is really tried."""
    import torch

    emulated = device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(False)
    if emulated:
        return "this GPU only emulates it"
    try:
        eye = torch.eye(16, device=device).to(dtype)
        right = bool(((eye @ eye).float() == torch.eye(16, device=device)).all())
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return first_line(error)
    return None if right else "the product came out wrong"


def first_line(error: BaseException) -> str:
    """An exception's first line without its full stop, for use inside a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".")


def reason_of(error: BaseException) -> str:
    """first_line, said so that it means something alone: a KeyError's is only the key, a missing package a module."""
    line = first_line(error)
    if isinstance(error, ImportError):
        return f"a package is missing or does not fit ({line})"
    return f"it lacks {line}" if isinstance(error, LookupError) else line


def machine_words(device: str) -> str:
    """The device; for a CPU its maker's name where the system tells it, and how many cores may be used."""
    if device != "cpu":
        return device
    count = cores()
    return f"{cpu_name()}, {count} core{'s' if count != 1 else ''}"


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name, such as "Intel(R) Xeon(R) Platinum 8480+", or its architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "cpu"


@contextmanager
def sharing(device: str) -> Iterator[tuple[int, int, str]]:
    """(rank, how many, this rank's device) under torchrun, with a process group while it lasts; else (0, 1, device)."""
    import torch

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield 0, 1, device
        return
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu else device
    # gloo on GPUs too: what is exchanged are a few kilobytes of settings that lie on the CPU.
    torch.distributed.init_process_group("gloo")
    try:
        yield torch.distributed.get_rank(), world, own
    finally:
        torch.distributed.destroy_process_group()
