"""calibrate.py measures MagCache's table on a model: how the size of a delta changes from step to step.

It computes everything and only watches, so one picture costs one picture; a few prompts are enough, because the
ratios hardly depend on the prompt (that is MagCache's finding, arXiv 2506.09045).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hasten.compare import Progress
from hasten.hosts.diffusers import accelerate
from hasten.lane import History
from hasten.moment import Moment
from hasten.output import check_writable, write_files
from hasten.painter import Request, each_step, quiet_logs
from hasten.recipe import Cache, Recipe
from hasten.signal import magnitude_ratio

if TYPE_CHECKING:
    from pathlib import Path

    from hasten.painter import FluxPainter


def calibrate(
    pipe: Any, prompts: Sequence[str], *, on_prompt: Callable[[int], None] | None = None, **options: Any
) -> list[float]:
    """The ratios of `cache.ratios`: one for each step, 1.0 first, averaged over the prompts.

    pipe: a FLUX pipeline of diffusers. options: what its calls take (num_inference_steps, height, width, ...).
    on_prompt: told how many prompts are done. Raises ValueError when no prompt is given, when a run has fewer than
    two steps, and when a delta is not finite.
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
    if not sums:
        raise ValueError("the runs had one step: a ratio needs two; give more steps, as many as you will draw with.")
    ratios = [1.0, *(round(sums[i] / counts[i], 5) for i in sorted(sums))]
    if not all(map(math.isfinite, ratios)):
        raise ValueError("the model gave numbers that are not finite: try another dtype, such as bfloat16 or float32.")
    return ratios


def check_calibration(requests: Sequence[Request], out: Path | None) -> None:
    """Returns when these requests can be calibrated on and the recipe can be written. Raises ValueError or OSError."""
    if requests[0].steps < 2:
        raise ValueError(
            f"steps is {requests[0].steps}: calibration compares each step with the one before; at least 2."
        )
    if out is not None:
        check_writable(out, suffix=".toml")


def calibrated_recipe(painter: FluxPainter, requests: Sequence[Request], *, progress: Progress | None = None) -> Recipe:
    """A MagCache recipe with the ratios measured on the painter's model, one picture for each request.

    requests: alike but for their prompts; at least one. The pictures are not decoded. progress: told each step.
    """
    import torch

    first, steps, done = requests[0], requests[0].steps, 0

    def on_step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("calibrating", done, steps * len(requests))

    with quiet_logs():
        ratios = calibrate(
            painter.pipe,
            [request.prompt for request in requests],
            num_inference_steps=steps,
            width=first.width,
            height=first.height,
            guidance_scale=first.guidance,
            generator=torch.Generator("cpu").manual_seed(first.seed),
            max_sequence_length=painter.text_tokens,
            callback_on_step_end=each_step(on_step),
            **painter.call_options,
        )
    prompts = "1 prompt" if len(requests) == 1 else f"{len(requests)} prompts"
    words = f"MagCache's ratios of {painter.model}: {prompts}, {first.size}, {steps} steps, {painter.dtype}."
    return Recipe(cache=Cache(method="magcache", ratios=tuple(ratios)), description=words)


def write_recipe(recipe: Recipe, out: Path) -> None:
    """Writes the recipe file whole, or leaves what stood there before. Raises OSError."""
    write_files({out: recipe.to_toml().encode()})
