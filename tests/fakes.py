"""A painter without a model: pictures are made of numbers, so that what is around it can be tested in no time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from hasten.painter import Drawing, Request
from hasten.recipe import Recipe
from hasten.report import Evaluation, Report


class FakePainter:
    """Draws noise that is nearer to the plain run the more is computed. computed: evaluations by recipe."""

    model, device, dtype = "fake", "cpu", "float32"

    def __init__(self, computed: dict[str, int] | None = None, *, wall_s: dict[int, float] | None = None) -> None:
        self.computed = computed or {}
        self.wall_s = wall_s or {}
        self.steps_drawn: list[int] = []

    def paint(self, request: Request, recipe: Recipe, *, on_step: Callable[[], None] | None = None) -> Drawing:
        """Noise of the request's seed, blurred with other noise by what was left out."""
        self.steps_drawn.append(request.steps)
        for _ in range(request.steps if on_step else 0):
            on_step()
        count = min(self.computed.get(recipe.name or "", request.steps), request.steps)
        report = Report(recipe=recipe.to_dict(), intervals=request.steps)
        for i in range(request.steps):
            decision = "compute" if i < count else "reuse"
            report.evaluations.append(Evaluation(i, i, 1 - i / request.steps, decision, None, None, "fake", 1))
        # Plain steps drift three times as fast as reuse does; a recipe named "poor" drifts furthest of all.
        amount = 0.03 * (28 - request.steps) + 0.01 * (request.steps - count)
        images = [self._picture(request, seed, 0.9 if recipe.name == "poor" else amount) for seed in request.seeds]
        return Drawing(images, self.wall_s.get(count, 0.1 * count), report)

    def _picture(self, request: Request, seed: int, amount: float) -> Image.Image:
        shape = (request.height, request.width, 3)
        base, other = (np.random.default_rng(s).random(shape) for s in (seed, seed + 1000))
        return Image.fromarray(((base * (1 - amount) + other * amount) * 255).astype(np.uint8))
