"""comfy_options.py names our places in ComfyUI's options, and copies options for a run of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Our place in `transformer_options`, and the key of our wrappers.
KEY = "hasten"
# In one call's own options only: the call under way.
CALL = "hasten_call"
# What attention node is in charge, for the line on the node.
ATTENTION = "hasten_attention"

# comfy.patcher_extension.WrappersMP, the same in every version seen.
OUTER_SAMPLE, PREDICT_NOISE, APPLY_MODEL = "outer_sample", "predict_noise", "apply_model"


def copied(options: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts and lists anew, everything else as it is."""
    new: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, dict):
            new[key] = copied(value)
        else:
            new[key] = list(value) if isinstance(value, list) else value
    return new
