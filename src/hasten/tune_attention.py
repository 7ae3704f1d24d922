"""tune_attention.py searches block-sparse attention's settings on a model, while it draws a few pictures exactly.

Of each picture a few steps are looked at, of each step every block's q, k, v as they come: nothing is stored but the
settings. Minutes for FLUX.1-dev's 57 blocks; interrupted, it goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hasten.compare import Progress
from hasten.hosts.diffusers_attention import HungAttention, block_names
from hasten.painter import Request
from hasten.recipe import Attention, Recipe
from hasten.sparse import Sparse, Tuning

if TYPE_CHECKING:
    from hasten.painter import FluxPainter

# Where in a run q, k, v are looked at, as fractions of its steps: attention changes most at its beginning.
LOOKS = (0.15, 0.45, 0.8)


def tune_attention(
    painter: FluxPainter, requests: Sequence[Request], file: Path, *, l1: float = 0.06, pv_l1: float = 0.065,
    rank: int = 0, world: int = 1, progress: Progress | None = None, attend: Sparse | None = None,
) -> str:  # fmt: skip
    """Writes the settings' file and says in one sentence what they spare, or that dense attention is faster.

    requests: one picture each, alike but for prompts and seeds. rank, world: this process among those that share the
    search, each with a group of torch.distributed. Raises ValueError on limits that make no sense or a model that is
    no FLUX.
    """
    transformer = painter.pipe.transformer
    blocks = [*getattr(transformer, "transformer_blocks", ()), *getattr(transformer, "single_transformer_blocks", ())]
    if type(transformer).__name__ != "FluxTransformer2DModel":
        raise ValueError(f"{type(transformer).__name__} has no attention that can be tuned: a FLUX is expected.")
    names = block_names(blocks)
    calls = len(requests) * len(LOOKS)
    tuning = Tuning(names, file, l1=l1, pv_l1=pv_l1, calls=calls, rank=rank, world=world, attend=attend)
    step, began, at_first = 0, time.monotonic(), tuning.left
    looks: set[int] = set()
    grid = (0, 0)

    def listen(index: int) -> Any:
        exactly = hung.attentions[index].attend

        def seeing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if step in looks:
                tuning.see(names[index], q, k, v, text_rows=painter.text_tokens, grid=grid)
                if progress is not None and at_first:
                    done = at_first - tuning.left
                    left = (time.monotonic() - began) * tuning.left / max(done, 1) / 60
                    progress(f"about {left:.0f} min left", done, at_first)
            return exactly(q, k, v)

        return seeing

    def on_step() -> None:
        nonlocal step
        step += 1

    hung = HungAttention(blocks, Attention("sdpa"), apart=True)
    try:
        for index, attention in enumerate(hung.attentions):
            attention.attend = listen(index)  # type: ignore[method-assign]
        for request in requests:
            if tuning.left == 0:
                break
            patch = 2 * painter.pipe.vae_scale_factor
            grid = request.height // patch, request.width // patch
            step, looks = 0, {int(share * request.steps) for share in LOOKS}
            painter.paint(request, Recipe(), on_step=on_step)
    finally:
        hung.remove()
    return tuning.finish()
