"""calibrate.py measures MagCache's table on a model: how the size of a delta changes from step to step.

It computes everything and only watches, so one picture costs one picture; a few prompts are enough, because the
ratios hardly depend on the prompt (that is MagCache's finding, arXiv 2506.09045).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hasten.hosts.diffusers import accelerate
from hasten.lane import History
from hasten.moment import Moment
from hasten.recipe import Cache, Recipe
from hasten.signal import magnitude_ratio


def calibrate(
    pipe: Any, prompts: Sequence[str], *, on_prompt: Callable[[int], None] | None = None, **options: Any
) -> list[float]:
    """The ratios of `cache.ratios`: one for each step, 1.0 first, averaged over the prompts.

    pipe: a FLUX pipeline of diffusers. options: what its calls take (num_inference_steps, height, width, ...).
    on_prompt: told how many prompts are done. Raises ValueError when no prompt is given.
    """
    if not prompts:
        raise ValueError("calibration needs at least one prompt; three to ten are usual.")
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}

    def watch(moment: Moment, history: History, delta: Tensor) -> None:
        # No step before, or a step's second evaluation (Heun): nothing that a table of steps could say.
        if history.deltas and moment.ordinal == 0:
            ratio = float(magnitude_ratio(delta, history.deltas[-1].to(delta.device)))
            sums[moment.interval] = sums.get(moment.interval, 0.0) + ratio
            counts[moment.interval] = counts.get(moment.interval, 0) + 1

    run = accelerate(pipe, Recipe(cache=Cache(method="interval", every=1)))
    run.watch = watch
    with run:
        for done, prompt in enumerate(prompts):
            pipe(prompt, output_type="latent", **options)
            if on_prompt is not None:
                on_prompt(done + 1)
    return [1.0, *(round(sums[i] / counts[i], 5) for i in sorted(sums))]
