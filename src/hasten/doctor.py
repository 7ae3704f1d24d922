"""What works on this machine, and why the rest does not: everything is really tried, nothing is guessed.

Each finding is a Check (name, ok, words). Nothing here raises: a failure is a finding too.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hasten
from hasten.machine import cores, cpu_name, dtype_works, first_line

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "safetensors", "torchmetrics", "torchao")
NEEDED = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "torchmetrics")
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")
SDPA = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH", "CUDNN_ATTENTION")
# Import names of attention libraries that users bring, and what to install for them.
ATTENTION = {
    "flash_attn": "flash-attn",
    "sageattention": "sageattention",
    "spas_sage_attn": "spas-sage-attn",
    "comfy_kitchen": "comfy-kitchen",
    "xformers": "xformers",
}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16")


@dataclass(frozen=True)
class Check:
    """One finding. needed: without it hasten cannot draw at all."""

    name: str
    ok: bool
    words: str
    needed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"name": self.name, "ok": self.ok, "words": self.words, "needed": self.needed}


def examine() -> dict[str, list[Check]]:
    """Every finding, by room: versions, devices, formats, attention, compiling, hasten's own files."""
    return {
        "versions": [Check("hasten", True, hasten.__version__), python(), *map(package, PACKAGES)],
        "devices": _guarded("devices", devices),
        "formats": _guarded("formats", formats),
        "attention": [
            *_guarded("attention", sdpa_kernels),
            *map(attention_package, ATTENTION),
            *_guarded("attention", attentions),
        ],
        "compiling": [compiler(), *_guarded("compiling", transforms)],
        "hasten's files": [*_guarded("recipes", recipes), *_guarded("models", models)],
    }


def can_draw(findings: dict[str, list[Check]]) -> bool:
    """Whether everything that is needed was found."""
    return all(check.ok or not check.needed for checks in findings.values() for check in checks)


def python() -> Check:
    """The interpreter and the system."""
    return Check("python", sys.version_info >= (3, 10), f"{platform.python_version()} on {platform.platform()}", True)


def package(name: str) -> Check:
    """A package's version, or why it cannot be used; it is really imported."""
    needed = name in NEEDED
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, "not installed", needed)
    reason = _import_failure(name)
    return Check(name, reason is None, version if reason is None else f"{version}, but {reason}", needed)


def attention_package(name: str) -> Check:
    """Whether an attention library that users bring can be imported."""
    reason = _import_failure(name)
    if reason is None:
        return Check(ATTENTION[name], True, _version_of(ATTENTION[name]))
    return Check(ATTENTION[name], False, reason)


def devices() -> list[Check]:
    """The CPU with its features and memory, then every GPU."""
    import torch

    flags = _cpu_flags()
    threads = torch.get_num_threads()
    words = [cpu_name(), f"{cores()} core{'s' * (cores() > 1)}", f"{_memory_gib():.0f} GiB"]
    words.append(f"{threads} thread{'s' * (threads > 1)} in use")
    known = [flag for flag in CPU_FLAGS if flag in flags]
    found = [Check("cpu", True, ", ".join([*words, *known]))]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            at = torch.cuda.get_device_properties(i)
            free = torch.cuda.mem_get_info(i)[0] / 2**30
            words = [at.name, f"compute capability {at.major}.{at.minor}"]
            words.append(f"{free:.1f} of {at.total_memory / 2**30:.1f} GiB free")
            found.append(Check(f"cuda:{i}", True, ", ".join(words)))
    else:
        built = torch.version.cuda
        why = f"torch was built for CUDA {built}, but no GPU answers" if built else "torch was built without CUDA"
        found.append(Check("cuda", False, why))
    if sys.platform == "darwin":
        mps = torch.backends.mps.is_available()
        found.append(Check("mps", mps, "Apple GPU" if mps else "torch sees no Apple GPU"))
    return found


def formats() -> list[Check]:
    """The number formats that the best device multiplies in."""
    import torch

    device = best_device()
    found = []
    for name in DTYPES:
        dtype = getattr(torch, name, None)
        if dtype is None:
            found.append(Check(name, False, f"torch {torch.__version__} does not know it"))
            continue
        tried = dtype_works if name in ("float32", "bfloat16", "float16") else _scaled_works
        reason = tried(dtype, device)
        found.append(Check(name, reason is None, f"multiplies on {device}" if reason is None else reason))
    return found


def sdpa_kernels() -> list[Check]:
    """Each kernel of torch's scaled_dot_product_attention, run alone on the best device."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    device = best_device()
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    query = torch.ones(1, 2, 64, 64, device=device, dtype=dtype)
    found = []
    for name in SDPA:
        words = "sdpa " + name.lower().removesuffix("_attention")
        kernel = getattr(SDPBackend, name, None)
        if kernel is None:
            found.append(Check(words, False, f"torch {torch.__version__} does not have it"))
            continue
        reason = _quietly(partial(_attend, sdpa_kernel, kernel, scaled_dot_product_attention, query))
        if reason is not None and device.type == "cpu":
            reason = "is not for a CPU"  # torch's own words there are about kernels being switched off
        found.append(Check(words, reason is None, f"works on {device}" if reason is None else reason))
    return found


def attentions() -> list[Check]:
    """Each of hasten's attention back-ends on the best device, tested against float32 at FLUX's head size."""
    import torch

    from hasten.attention import judge
    from hasten.attention_backends import BACKENDS, Ask

    device = best_device()
    ask = Ask(device, torch.float32 if device.type == "cpu" else torch.bfloat16, 24, 128, 1024, 1024)
    found = []
    for name, backend in BACKENDS.items():
        verdict = judge(backend, ask)
        found.append(Check(f"hasten {name}", verdict.ok, f"{backend.words}{': ' * (not verdict.ok)}{verdict.reason}"))
    return found


def compiler() -> Check:
    """Whether torch.compile finds what it compiles with."""
    named = os.environ.get("CXX")
    found = next((path for path in (named, "c++", "g++", "clang++", "cl") if path and shutil.which(path)), None)
    if found is None:
        return Check("c++ compiler", False, "none found: torch.compile on a CPU needs one; install g++ or clang")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return Check("c++ compiler", False, f"{shutil.which(found)}, but Python.h is missing: install python3-dev")
    return Check("c++ compiler", True, str(shutil.which(found)))


def transforms() -> list[Check]:
    """What [compile] and [quantize] of a recipe find here."""
    from hasten.compile import cannot_compile
    from hasten.kernels.rows import triton_kernels
    from hasten.quantize import format_for

    device = best_device()
    reason = cannot_compile()
    found = [Check("torch.compile", reason is None, "blocks can be compiled" if reason is None else reason)]
    try:
        found.append(Check("8-bit layers", True, f'format = "auto" is {format_for("auto", device)} on {device}'))
    except ValueError as error:
        found.append(Check("8-bit layers", False, str(error)))
    by_triton = device.type == "cuda" and triton_kernels() is not None
    words = "by Triton's kernels" if by_triton else "by torch's own operations: right, but not faster"
    found.append(Check("fused passes", by_triton, words))
    return found


def recipes() -> list[Check]:
    """Every shipped recipe, really loaded."""
    from hasten.data import recipe_folder
    from hasten.recipe import Recipe, recipe_names

    names = recipe_names()
    for name in names:
        Recipe.load(name)
    words = f"{', '.join(names)} in {recipe_folder()}" if names else f"none in {recipe_folder()}"
    return [Check("recipes", bool(names), words)]


def models() -> list[Check]:
    """The models that ship, their files judged by their headers."""
    from hasten.data import models_folder
    from hasten.loading import SHIPPED, Model, check_model

    found = []
    for name in SHIPPED:
        try:
            check_model(Model(name))
            found.append(Check(name, True, str(models_folder() / name)))
        except (ValueError, OSError) as error:
            found.append(Check(name, False, first_line(error)))
    return found


def best_device() -> Any:
    """The torch.device that `--device auto` takes."""
    from hasten.machine import pick_device

    return pick_device("auto")


def _guarded(name: str, examine_room: Callable[[], list[Check]]) -> list[Check]:
    """The room's findings, or the one that it could not be examined: doctor never ends in a traceback."""
    try:
        return examine_room()
    except Exception as error:
        return [Check(name, False, first_line(error))]


def _quietly(attempt: Callable[[], Any]) -> str | None:
    """None when the attempt works, else its reason: a warning that came with the failure says more than it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            attempt()
        except Exception as error:
            reasons = [first_line(w.message) for w in said if isinstance(w.message, Warning)]
            told = [reason for reason in reasons if not reason.endswith("not used because:")]
            return _without_trail((told or [first_line(error)])[0])
    return None


def _without_trail(words: str) -> str:
    """A reason without the "(Triggered internally at ...)" that torch hangs on its warnings."""
    return words.partition(" (Triggered internally")[0].rstrip(". ")


def _attend(choose: Any, kernel: Any, attention: Any, query: Any) -> None:
    with choose(kernel):
        attention(query, query, query)
    if query.device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def _scaled_works(dtype: Any, device: Any) -> str | None:
    """None when the quantised product of that format works: torch._scaled_mm for fp8, torch._int_mm for int8."""
    import torch

    def attempt() -> None:
        # Column-major on the right, as the kernels want it; 32 rows because _int_mm takes no fewer than 17.
        a, b = torch.ones(32, 32, device=device), torch.ones(32, 32, device=device)
        if dtype == torch.int8:
            torch._int_mm(a.to(dtype), b.to(dtype).t())
        else:
            one = torch.tensor(1.0, device=device)
            torch._scaled_mm(a.to(dtype), b.to(dtype).t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return _quietly(attempt)


def _import_failure(name: str) -> str | None:
    try:
        found = importlib.util.find_spec(name) is not None
    except ValueError:
        found = True  # a stub that someone put into sys.modules: importing it will tell
    if not found:
        return "not installed"
    return _quietly(lambda: importlib.import_module(name))


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _memory_gib() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return 0.0


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return set()
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()
