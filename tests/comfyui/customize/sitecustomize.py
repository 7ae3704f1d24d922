"""What ComfyUI imports and a CPU build of torch cannot have: Python runs this file as it starts the server.

torchvision's wheels are built for CUDA and look for two operators at import; torchaudio's do not load at all. Tests
draw pictures and use neither: empty stand-ins satisfy the imports.
"""

import importlib.machinery
import importlib.util
import sys
import types

import torch

_kept = []  # the operators live as long as their library


def stand_in() -> None:
    """Puts the stand-ins where there is no GPU; once for a process."""
    if torch.cuda.is_available() or _kept:
        return
    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        library.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
    if importlib.util.find_spec("torchaudio") is None:
        whole = _module("torchaudio")
        for part in ("functional", "transforms"):
            setattr(whole, part, _module(f"torchaudio.{part}"))


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    # Packages that ask whether it is there look at its spec.
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module
    return module


stand_in()
