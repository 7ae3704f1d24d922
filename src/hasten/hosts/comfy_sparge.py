"""comfy_sparge.py: the original pack's SpargeAttn nodes, by our block-sparse attention, per model and removable.

Which block a call of ComfyUI's attention belongs to is told by a patch around each block, chained onto what is there,
and by a number in a tensor, for compiled blocks would be compiled anew for each name.
In tuning mode every picture is exact, and a few steps of it are searched; what was found is saved when the sampling is
over, wherever in the graph the saving node stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from hasten.attention import Attention, attend_numbered
from hasten.attention_backends import Ask
from hasten.hosts.comfy import tell
from hasten.hosts.comfy_attention import SLOT, TEXT_ROWS, drop_attention, tell_grid
from hasten.hosts.comfy_lines import counted
from hasten.hosts.comfy_options import ATTENTION, OUTER_SAMPLE
from hasten.marks import Numbers
from hasten.recipe import Skip
from hasten.sparse import Heads, Tuning, save_settings

BLOCK, KEY = "hasten_block", "hasten_sparge"

# Where in a run q, k, v are looked at, as fractions of its steps, and how many pictures one search lasts.
LOOKS, PICTURES = (0.15, 0.45, 0.8), 3


def block_names(network: Any, skip: Skip = Skip()) -> list[str]:  # noqa: B008 - frozen
    """The names of a ComfyUI FLUX's blocks, without those that keep their own attention. Raises ValueError."""
    stacks: dict[str, Any] = {kind: getattr(network, f"{kind}_blocks", None) for kind in ("double", "single")}
    if None in stacks.values():
        raise ValueError(f"{type(network).__name__} is no FLUX: its attention cannot be made sparse")
    return [
        f"{kind}_blocks.{i}"
        for kind, stack in stacks.items()
        for i in range(len(stack))
        if i not in getattr(skip, kind)
    ]


class Search:
    """A search that lives on the clone: its tuning, where it is to be saved when a run is over, and who says so."""

    def __init__(self, tuning: Tuning) -> None:
        self.tuning = tuning
        self.to: Path | None = None
        self.node: str | None = None

    def save(self) -> str:
        """Writes what was found so far; a sentence about it, or about why it could not be written."""
        if not self.tuning.settings:
            return "nothing was tuned yet: the file is written when the sampling is over"
        assert self.to is not None
        try:
            save_settings(self.tuning.settings, self.to)
        except (OSError, SafetensorError) as error:
            return f"{self.to} cannot be written ({error}): what was found stays in {self.tuning.file}"
        more = f", {self.tuning.left} calls are left: queue it again" if self.tuning.left else ""
        return f"{self.to.name}: {self.tuning.words()}{more}"


def put_sparge(
    model: Any, names: Sequence[str], *, settings: Mapping[str, Heads] | None = None, search: Search | None = None
) -> Any:
    """A clone of `model` whose blocks `names` attend sparsely, by tuned settings or top-k, or are searched."""
    clone = drop_attention(model)
    to = clone.model_options.setdefault("transformer_options", {})
    found = to.get(SLOT)
    said: list[str] = []
    attentions = {name: Attention("sparse", say=_once(said)) for name in names}
    for name, heads in (settings or {}).items():
        if name in attentions:
            attentions[name].heads = Numbers(heads.keep, heads.alike, heads.skip_below)
    to[SLOT] = _override(attentions, found, said, search)
    tell_grid(clone, attentions.values())
    to[ATTENTION] = "sparse" if search is None else "being tuned"
    # Patches as ComfyUI's own nodes put them: a dict of its own for this clone.
    replace = dict(to.get("patches_replace", {}))
    dit = dict(replace.get("dit", {}))
    text_rows = [TEXT_ROWS]
    for name, attention in attentions.items():
        kind, _, index = name.partition("_blocks.")
        key = (f"{kind}_block", int(index))
        dit[key] = _naming(attention, text_rows, dit.get(key))
    replace["dit"] = dit
    to["patches_replace"] = replace
    clone.remove_wrappers_with_key(OUTER_SAMPLE, KEY)
    if search is not None:
        clone.add_wrapper_with_key(OUTER_SAMPLE, KEY, _saving(search))
    return clone


def search_of(model: Any) -> Search | None:
    """The search that is under way on `model`, or None."""
    slot = model.model_options.get("transformer_options", {}).get(SLOT)
    found: Search | None = getattr(slot, "hasten_search", None)
    return found


def _saving(search: Search) -> Callable[..., Any]:
    def sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return executor(*args, **kwargs)
        finally:
            if search.to is not None and search.tuning.settings:
                tell(search.node, search.save())

    return sampling


def _naming(attention: Attention, text_rows: list[int], before: Any) -> Callable[..., Any]:
    """A patch around one block that says inside whose attention it is, and to that how many tokens are text.

    text_rows: of the latest block that was given its text apart; single blocks are not.
    """

    def patch(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        if "txt" in args:
            text_rows[0] = args["txt"].shape[1]
        attention.text_rows = text_rows[0]
        # A node that was applied later stands further out, and its word counts: another pack's patch may be between.
        to = {BLOCK: attention.number, **(args.get("transformer_options") or {})}
        own = {**args, "transformer_options": to}
        return extra["original_block"](own) if before is None else before(own, extra)

    patch.hasten_before = before  # type: ignore[attr-defined]
    return patch


def _override(
    attentions: Mapping[str, Attention], found: Any, said: list[str], search: Search | None
) -> Callable[..., Any]:
    known = {int(attention.number): (name, attention) for name, attention in attentions.items()}

    def overriding(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        to = kwargs.get("transformer_options") or {}
        number: Any = to.get(BLOCK)
        heads = args[3] if len(args) > 3 else kwargs["heads"]
        mask = args[4] if len(args) > 4 else kwargs.get("mask")
        q, k, v = args[:3]
        if not kwargs.get("skip_reshape", False):
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        plain = number is not None and mask is None and kwargs.get("scale") is None
        takes_it = plain and search is None
        if takes_it and not torch.compiler.is_compiling():  # compiled, the attention itself gives way as it runs
            takes_it = int(number) in known and known[int(number)][1].fits(Ask.of(q, k))
        counted(kwargs, takes_it, "sparse" if takes_it else "", said)
        if search is not None and plain and int(number) in known and _looked_at(to):
            name, attention = known[int(number)]
            search.tuning.see(name, q, k, v, text_rows=attention.text_rows, grid=attention.grid)
        if not takes_it:
            return func(*args, **kwargs) if found is None else found(func, *args, **kwargs)
        out = attend_numbered(number, q, k, v)
        return out if kwargs.get("skip_output_reshape", False) else out.transpose(1, 2).flatten(2)

    overriding.hasten_found = found  # type: ignore[attr-defined]
    overriding.hasten_search = search  # type: ignore[attr-defined]
    overriding.hasten_attentions = [*attentions.values()]  # type: ignore[attr-defined]
    return overriding


def _once(said: list[str]) -> Callable[[str], None]:
    return lambda text: None if text in said else said.append(text)


def _looked_at(to: Mapping[str, Any]) -> bool:
    """Whether the call lies in one of the steps that are searched; every step where the host does not tell."""
    sigmas, now = to.get("sample_sigmas"), to.get("sigmas")
    if sigmas is None or now is None:
        return True
    steps = len(sigmas) - 1
    looks = {int(share * steps) for share in LOOKS}
    step = int((sigmas[:-1] - now.flatten()[0].to(sigmas)).abs().argmin())
    return step in looks
