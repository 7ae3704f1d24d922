"""comfy_lines.py: what a node without a cache (attention, compile, fast kernels) says after each sampling run.

Its text stays on the model as a plain value and goes with the clone it was put on; a wrapper shows it when a run ends.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from hasten.hosts.comfy import tell
from hasten.hosts.comfy_options import OUTER_SAMPLE, copied

# Our place in `transformer_options` for the texts, and in one run's own options for its count of attention calls.
KEY, COUNT = "hasten_lines", "hasten_count"


class Count:
    """Attention calls of one run. An object, for ComfyUI copies dicts from call to call."""

    def __init__(self) -> None:
        self.taken = self.left = 0
        self.used: set[str] = set()
        self.said: list[str] = []

    def __str__(self) -> str:
        if not self.taken + self.left:
            return "was asked for nothing that could be counted: blocks are compiled, or another pack's is in front"
        by = f" by {', '.join(sorted(self.used))}" if self.used else ""
        return " · ".join([f"took {self.taken} of {self.taken + self.left} calls{by}", *self.said])


def put_line(model: Any, kind: str, text: str, *, node: str | None, title: str, counts: bool = False) -> Any:
    """A clone of `model` whose runs end with `text` on `node`, and how long they took.

    kind: a later node of the same kind replaces an earlier one, which says so. counts: attention calls are told too.
    """
    clone = model.clone()
    lines = clone.model_options.setdefault("transformer_options", {}).setdefault(KEY, {})
    earlier = lines.get(kind)
    replaced = [*earlier["replaced"], earlier["node"]] if earlier else []
    lines[kind] = {
        "node": node,
        "text": text,
        "title": title,
        "counts": counts,
        "replaced": [other for other in replaced if other not in (None, node)],
    }
    clone.remove_wrappers_with_key(OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(OUTER_SAMPLE, KEY, telling)
    return clone


def drop_line(model: Any, kind: str) -> Any:
    """A clone of `model` without the line of that kind."""
    clone = model.clone()
    to = clone.model_options.get("transformer_options", {})
    to.get(KEY, {}).pop(kind, None)
    if not to.get(KEY):
        to.pop(KEY, None)
        clone.remove_wrappers_with_key(OUTER_SAMPLE, KEY)
    return clone


def telling(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """The OUTER_SAMPLE wrapper: counts in this run's own options, tells every line when the run is over."""
    guider = executor.class_obj
    options = guider.model_options
    own = copied(options)
    lines = own.get("transformer_options", {}).get(KEY, {})
    count = Count()
    own["transformer_options"][COUNT] = count
    started = time.perf_counter()
    guider.model_options = own
    try:
        return executor(*args, **kwargs)
    finally:
        guider.model_options = options
        seconds = time.perf_counter() - started
        for line in lines.values():
            parts = [line["text"], *([str(count)] if line["counts"] else []), f"sampling took {seconds:.1f} s"]
            tell(line["node"], " · ".join(parts))
            for other in line["replaced"]:
                tell(other, f"not in charge: {line['title']}, later in the graph, replaced it")


def counted(kwargs: dict[str, Any], taken: bool, used: str = "", said: Sequence[str] = ()) -> None:
    """Notes one attention call in its run's count: by which back-end, and why another gave way.

    Nothing inside compiled code, where a count would be a guard.
    """
    if torch.compiler.is_compiling():
        return
    count = (kwargs.get("transformer_options") or {}).get(COUNT)
    if count is not None:
        count.taken += taken
        count.left += not taken
        if used:
            count.used.add(used)
        count.said[:] = said
