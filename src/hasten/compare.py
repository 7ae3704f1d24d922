"""Pictures held against each other: PSNR and SSIM, and recipes beside the plain run and beside fewer steps.

It reaches a host through the Painter protocol only, and knows nothing of files or of the command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.painter import Drawing, Painter, Request
from hasten.recipe import Cache, Recipe

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    Picture = Image | np.ndarray[Any, Any]

DATA_RANGE = 255.0  # of 8-bit pictures, which float ones are stretched to
SMALLEST = 11  # pixels a side: SSIM's Gaussian window

# Told what is drawn, how many denoising steps of it are done, and of how many.
Progress = Callable[[str, int, int], None]


def psnr_db(a: Picture, b: Picture) -> float:
    """Peak signal-to-noise ratio in dB of two pictures of one size; infinite when they are identical.

    a, b: PIL images, or arrays (H, W, 3) or (B, H, W, 3), uint8 or float32 from 0 to 1; a batch is pooled, as if it
    were one picture. Computed by torchmetrics with a data range of 255. Raises ValueError on unequal sizes.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    first, second = _pair(a, b)
    if bool((first == second).all()):
        return math.inf
    return float(peak_signal_noise_ratio(first, second, data_range=DATA_RANGE))


def ssim(a: Picture, b: Picture) -> float:
    """Structural similarity of two pictures, 1.0 for identical ones; the mean over a batch.

    a, b as for psnr_db. Computed by torchmetrics with a data range of 255 and a Gaussian window of 11 pixels.
    Raises ValueError on unequal sizes and on pictures smaller than that window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    first, second = _pair(a, b)
    height, width = first.shape[-2:]
    if min(height, width) < SMALLEST:
        raise ValueError(f"SSIM needs at least {SMALLEST}x{SMALLEST} pixels, the pictures have {width}x{height}.")
    value = structural_similarity_index_measure(first, second, data_range=DATA_RANGE)
    assert not isinstance(value, tuple), "only asked for the mean"
    return float(value)


def read_picture(path: Path) -> Image:
    """The picture in the file as 8-bit RGB. Raises FileNotFoundError, or ValueError when it is no picture."""
    import PIL.Image

    if not path.is_file():
        raise FileNotFoundError(f"there is no picture file {path}: check the path, or put a prompt in quotes.")
    try:
        with PIL.Image.open(path) as image:
            return image.convert("RGB")
    except (PIL.UnidentifiedImageError, OSError, SyntaxError):
        raise ValueError(f"{path} is not a picture that can be read: give a PNG or JPEG file.") from None


def _pair(a: Picture, b: Picture) -> tuple[Any, Any]:
    """Both as float tensors (B, 3, H, W) from 0 to 255."""
    import torch

    first, second = _pixels(a), _pixels(b)
    if first.shape != second.shape:
        sizes = " and ".join(_size_words(pixels.shape) for pixels in (first, second))
        raise ValueError(f"the pictures have unequal sizes, {sizes}: only pictures of one size can be compared.")
    return torch.from_numpy(first).permute(0, 3, 1, 2).float(), torch.from_numpy(second).permute(0, 3, 1, 2).float()


def _pixels(picture: Picture) -> np.ndarray[Any, Any]:
    """A picture or a batch as (B, H, W, 3) from 0 to 255, in memory of its own."""
    import numpy as np
    from PIL.Image import Image

    if isinstance(picture, Image):
        return np.array(picture.convert("RGB"))[None]
    if picture.dtype == np.float32 and picture.min() >= 0.0 and picture.max() <= 1.0:
        picture = picture * np.float32(DATA_RANGE)
    elif picture.dtype != np.uint8:
        raise ValueError(
            f"the picture is {picture.dtype} from {picture.min():g} to {picture.max():g}: uint8 from 0 to 255 or "
            "float32 from 0 to 1 is compared."
        )
    if picture.ndim not in (3, 4) or picture.shape[-1] != 3:
        raise ValueError(f"the picture's shape is {picture.shape}: (H, W, 3) or (B, H, W, 3) is expected.")
    return np.array(picture if picture.ndim == 4 else picture[None])


def _size_words(shape: tuple[int, ...]) -> str:
    count = "" if shape[0] == 1 else f"{shape[0]} times "
    return f"{count}{shape[2]}x{shape[1]}"


@dataclass(frozen=True)
class Likeness:
    """How near pictures are to the ones they are held against. psnr_db is None when they are identical."""

    psnr_db: float | None
    ssim: float

    @classmethod
    def of(cls, drawing: Drawing, baseline: Drawing) -> Likeness:
        """The likeness of two drawings' pictures, taken together; before rounding to 8 bits where the host tells."""
        import numpy as np

        if drawing.exact is not None and baseline.exact is not None:
            return cls.of_pictures(drawing.exact, baseline.exact)
        return cls.of_pictures(*(np.stack([np.asarray(i) for i in d.images]) for d in (drawing, baseline)))

    @classmethod
    def of_pictures(cls, a: Picture, b: Picture) -> Likeness:
        """The likeness of two pictures, or of two batches."""
        distance = psnr_db(a, b)
        return cls(None if math.isinf(distance) else round(distance, 3), round(ssim(a, b), 5))

    def to_dict(self) -> dict[str, Any]:
        """psnr_db and ssim for JSON, which knows no infinity: identical pictures have null and "identical"."""
        plain = {"psnr_db": self.psnr_db, "ssim": self.ssim}
        return plain | ({"identical": True} if self.psnr_db is None else {})

    @property
    def psnr_words(self) -> str:
        """As people read it: "34.2 dB", or "identical"."""
        return "identical" if self.psnr_db is None else f"{self.psnr_db:.1f} dB"


@dataclass(frozen=True)
class Row:
    """One way of drawing a request, with what it cost and how near it came to the plain run.

    kind: "baseline" (nothing reused), "recipe", or "fewer" (nothing reused, in fewer steps).
    """

    name: str
    kind: str
    drawing: Drawing
    steps: int
    likeness: Likeness
    speedup: float
    fewer: Row | None = None

    @property
    def computed(self) -> int:
        """How many evaluations of the model were computed."""
        return self.drawing.report.computed

    @property
    def strip(self) -> str:
        """One letter for each evaluation: C computed, P partial, . reused."""
        return self.drawing.report.strip

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; without the pictures."""
        report = self.drawing.report
        plain: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "steps": self.steps,
            "computed": report.computed,
            "reused": report.reused,
            "strip": self.strip,
            "wall_s": round(self.drawing.wall_s, 4),
            "speedup": round(self.speedup, 3),
            "cache_mib": round(report.cache_mib, 3),
            **self.likeness.to_dict(),
        }
        return plain | ({"fewer_steps": self.fewer.to_dict()} if self.fewer else {})


def compare_recipes(
    painter: Painter,
    request: Request,
    recipes: Sequence[tuple[str, Recipe]],
    *,
    takes: int = 1,
    progress: Progress | None = None,
) -> list[Row]:
    """The plain run first, then a row for each recipe that carries its rival: as many plain steps as it computed.

    recipes: names to show, and what they stand for. takes: how often each is drawn; the quickest counts, as others were
    held up by something else. Equal rivals are drawn once. Warm-up is the caller's: see warm_up.
    """

    def quickest(request: Request, recipe: Recipe, words: str) -> Drawing:
        return min((draw(painter, request, recipe, words, progress) for _ in range(takes)), key=lambda d: d.wall_s)

    baseline = quickest(request, Recipe.load("none"), "nothing reused")
    plain = {request.steps: Row("uncached", "baseline", baseline, request.steps, Likeness(None, 1.0), 1.0)}
    rows = [plain[request.steps]]
    for name, recipe in recipes:
        drawing = quickest(request, recipe, name)
        steps = max(1, drawing.report.computed)
        if steps not in plain:
            words = f"{steps} plain steps"
            fewer = quickest(request.with_steps(steps), Recipe.load("none"), words)
            plain[steps] = _row(words, "fewer", fewer, steps, baseline)
        rows.append(_row(name, "recipe", drawing, request.steps, baseline, plain[steps]))
    return rows


def warm_up(painter: Painter, request: Request, recipes: Sequence[Recipe]) -> None:
    """Draws briefly what will be timed, so that what happens only once stays outside the clock.

    One step plainly, then for each recipe a run that reuses every second step until as many deltas are remembered as
    it ever sums up: for each number of them a kernel is compiled. Recipes that are warmed by the same run share it.
    """
    painter.paint(request.with_steps(1), Recipe.load("none"))
    own = [replace(recipe, cache=recipe.sana) for recipe in recipes if recipe.sana is not None]
    for short, steps in dict.fromkeys(warming(recipe) for recipe in (*recipes, *own)):
        if short != Recipe():
            painter.paint(request.with_steps(steps), short)


def warming(recipe: Recipe) -> tuple[Recipe, int]:
    """A recipe that reuses every second step by the same signal, span and sum, and how many steps it takes."""
    cache = recipe.cache
    always = {"threshold": 10.0, "thresholds": (), "coefficients": (0.0,)}
    limits = {"start": 0.0, "end": 1.0, "sigma_start": None, "sigma_end": None, "first": True, "last": False}
    longest = max(map(len, cache.weights), default=1)
    deltas = {"taylor": cache.order + 1, "chebyshev": cache.window, "damped": 3, "weights": longest}
    count = deltas.get(cache.predictor, 1)
    plain = Cache()
    sums = {name: getattr(plain, name) for name in ("order", "degree", "ridge", "blend", "weights")}
    sums |= {"predictor": "chebyshev" if count > 1 else "hold", "window": max(count, 2)}
    how: dict[str, Any] = {**always, **limits, **sums, "max_consecutive_hits": 1}
    if cache.method in ("interval", "schedule", "magcache"):
        how |= {"method": "interval", "every": 2, "growth": 0.0, "steps": (), "of": 0, "ratios": ()}
    # One more for EasyCache, whose rate of change needs two computed evaluations.
    steps = 1 if cache.method == "none" else 2 * count + 2 * (cache.method == "easycache")
    short = Recipe() if cache.method == "none" else Recipe(cache=replace(cache, **how))
    return replace(short, skip=recipe.skip), steps


def _row(name: str, kind: str, drawing: Drawing, steps: int, baseline: Drawing, fewer: Row | None = None) -> Row:
    likeness = Likeness.of(drawing, baseline)
    return Row(name, kind, drawing, steps, likeness, baseline.wall_s / drawing.wall_s, fewer)


def draw(painter: Painter, request: Request, recipe: Recipe, words: str, progress: Progress | None = None) -> Drawing:
    """The drawing, with `progress` told before it and after each step what is drawn and how far it is."""
    if progress is None:
        return painter.paint(request, recipe)
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        progress(words, done, request.steps)

    progress(words, 0, request.steps)
    return painter.paint(request, recipe, on_step=on_step)
