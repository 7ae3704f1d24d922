"""on_device.py makes a GPU the current one: launches and events go there, whatever they are given.

Nearly always it is so already: then this is a look-up, where torch's own context asks the driver twice.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_AS_IT_IS = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """A context within which `device`, a CUDA device with an index, is the current one."""
    return _AS_IT_IS if device.index == torch.cuda.current_device() else torch.cuda.device(device)
