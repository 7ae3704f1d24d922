"""One command's worth of pictures: drawn, measured beside the plain run when asked, and written with their story.

It knows requests, drawings and files; which host draws is the painter's affair.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hasten
from hasten.compare import Progress, Row, compare_recipes, draw, warm_up
from hasten.output import check_writable, write_files
from hasten.painter import Drawing, Painter, Request, check_count
from hasten.recipe import Recipe
from hasten.showing import Showing, doubt

if TYPE_CHECKING:
    from PIL.Image import Image

REPORT_SCHEMA = 1


@dataclass(frozen=True)
class Outcome:
    """The drawing, its report file's content, and its row beside the plain run when that was drawn too.

    doubt: why the times beside each other are not to be trusted; empty when nothing speaks against them. beside: what
    else was drawn, by what stands in its files' names.
    """

    drawing: Drawing
    report: dict[str, Any]
    row: Row | None = None
    doubt: str = ""
    beside: Mapping[str, tuple[Request, Drawing]] = field(default_factory=dict)


# Files of what is drawn for a comparison: FILE-uncached.png and FILE-fewer.png.
UNCACHED, FEWER = "uncached", "fewer"


def picture_paths(out: Path, batch: int, what: str = "") -> list[Path]:
    """FILE.png, FILE-2.png, FILE-3.png ... for a batch; with `what` FILE-what.png, FILE-what-2.png ..."""
    first = out.with_name(f"{out.stem}-{what}{out.suffix}") if what else out
    return [first, *(first.with_name(f"{first.stem}-{i}{first.suffix}") for i in range(2, batch + 1))]


def check_outputs(out: Path, report: Path | None, batch: int, *, keep: bool = False) -> None:
    """Returns when the pictures and the report can be written. Raises ValueError or OSError; nothing is left."""
    check_count("batch", batch)
    for what in ("", *((UNCACHED, FEWER) if keep else ())):
        for path in picture_paths(out, batch, what):
            check_writable(path, suffix=".png")
    if report is not None:
        if report.suffix.lower() == ".png":
            raise ValueError(f"the report file {report} ends in .png: it is JSON, so give a name such as report.json.")
        check_writable(report)


def generate(
    painter: Painter,
    request: Request,
    recipe: Recipe,
    *,
    compare: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Draws the request under the recipe; with `compare` also plainly, and plainly in as many steps as were computed.

    What is timed is denoising and decoding. Alone there is no warm-up; compared, a short one comes first, so that
    the plain run does not pay for what happens only once.
    """
    name = recipe.name or "recipe"
    if not compare:
        drawing = draw(painter, request, recipe, name, progress)
        return Outcome(drawing, report_of(painter, request, recipe, drawing))
    warm_up(painter, request, [recipe])
    baseline, row = compare_recipes(painter, request, [(name, recipe)], progress=progress)
    report = report_of(painter, request, recipe, row.drawing)
    assert row.fewer is not None, "a recipe's row carries its rival"
    report |= {
        "baseline_wall_s": baseline.drawing.wall_s,
        "speedup": row.speedup,
        **row.likeness.to_dict(),
        "fewer_steps": {
            "steps": row.fewer.steps,
            "wall_s": row.fewer.drawing.wall_s,
            **row.fewer.likeness.to_dict(),
        },
    }
    beside = {
        UNCACHED: (request, baseline.drawing),
        FEWER: (request.with_steps(row.fewer.steps), row.fewer.drawing),
    }
    return Outcome(row.drawing, report, row, doubt([Showing(request, [baseline, row])]), beside)


def report_of(painter: Painter, request: Request, recipe: Recipe, drawing: Drawing) -> dict[str, Any]:
    """The report file's content; every key is always there. wall_s is denoising and decoding, in seconds."""
    run = drawing.report.to_dict()
    return {
        "schema": REPORT_SCHEMA,
        "version": hasten.__version__,
        "model": painter.model,
        "device": painter.device,
        "dtype": painter.dtype,
        "size": request.size,
        "steps": request.steps,
        "seed": request.seed,
        "recipe": recipe.to_dict(),
        "evaluations": run["evaluations"],
        "computed": run["computed"],
        "reused": run["reused"],
        "wall_s": drawing.wall_s,
        "cache_mib": run["cache_mib"],
    }


def story(painter: Painter, request: Request, recipe: Recipe) -> dict[str, str]:
    """What a PNG says of itself: all that is needed to draw it again. For one picture, not for a batch."""
    return {
        "Software": f"hasten {hasten.__version__}",
        "prompt": request.prompt,
        "seed": str(request.seed),
        "recipe": json.dumps(recipe.to_dict()),
        "version": hasten.__version__,
        "steps": str(request.steps),
        "guidance": str(request.guidance),
        "size": request.size,
        "model": painter.model,
    }


def png(image: Image, texts: dict[str, str] | None = None) -> bytes:
    """The picture as a PNG file's bytes, with `texts` as its metadata in UTF-8."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in (texts or {}).items():
        info.add_itxt(key, text)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def write_outcome(
    outcome: Outcome,
    painter: Painter,
    request: Request,
    recipe: Recipe,
    *,
    out: Path,
    report: Path | None,
    keep: bool = False,
) -> list[Path]:
    """The paths of the pictures and of the report, all of them written, or none. Raises OSError.

    keep: also the pictures that were drawn for the comparison.
    """
    contents: dict[Path, bytes] = {}
    drawn = [("", request, outcome.drawing, recipe)]
    if keep:
        # As they were drawn: the model stays as the recipe changed it.
        plain = Recipe(compile=recipe.compile, quantize=recipe.quantize)
        drawn += [(what, asked, drawing, plain) for what, (asked, drawing) in outcome.beside.items()]
    for what, asked, drawing, how in drawn:
        paths = picture_paths(out, asked.batch, what)
        for path, seed, image in zip(paths, asked.seeds, drawing.images, strict=True):
            contents[path] = png(image, story(painter, replace(asked, seed=seed, batch=1), how))
    if report is not None:
        contents[report] = (json.dumps(outcome.report, indent=2, allow_nan=False) + "\n").encode()
    write_files(contents)
    return list(contents)
