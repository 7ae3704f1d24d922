"""The contact sheet: every picture of a comparison on one labelled sheet, for eyes and for a README.

It knows rows of a comparison and how to lay them out; nothing of hosts or files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hasten.compare import Row
from hasten.showing import Showing

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

CELL = 256  # pixels across a picture
GAP = 20
MARGIN = 40
TITLE, HEADING = 42, 42  # pixels: the sheet's title, and a model's line
CAPTION = 84  # pixels under a picture: name, figures, strip

PAPER, INK, MUTED, RULE = "#faf9f7", "#1c1b1a", "#6d6a65", "#e3e0da"
COMPUTED, PARTIAL, REUSED, RIVAL = "#1f6f5c", "#7fb3a1", "#cfe3da", "#9a5b2b"
COLOURS = {"C": COMPUTED, "P": PARTIAL, ".": REUSED}


def contact_sheet(parts: Sequence[tuple[str, Sequence[Showing]]], *, title: str) -> Image:
    """One sheet: a column for the plain run and each recipe, and under each recipe its rival in plain steps.

    parts: one for each model, what it is in a line and what it drew.
    """
    from PIL import Image, ImageDraw

    columns = max(len(showing.rows) for _, showings in parts for showing in showings)
    width = 2 * MARGIN + columns * CELL + (columns - 1) * GAP
    heights = [HEADING + sum(_height(showing) for showing in showings) for _, showings in parts]
    sheet = Image.new("RGB", (width, 2 * MARGIN + TITLE + sum(heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 8), title, INK, font=_font(30))
    y = MARGIN + TITLE
    for words, showings in parts:
        pen.text((MARGIN, y + 4), _fitted(pen, words, width - 2 * MARGIN, 15), MUTED, font=_font(15))
        y += HEADING
        for showing in showings:
            _showing(sheet, pen, showing, y, width)
            y += _height(showing)
    return sheet


def _showing(sheet: Image, pen: ImageDraw, showing: Showing, y: int, width: int) -> None:
    pen.line((MARGIN, y, width - MARGIN, y), RULE, 1)
    words = f"“{showing.request.prompt}”"
    pen.text((MARGIN, y + 14), _fitted(pen, words, width - 2 * MARGIN, 20), INK, font=_font(20))
    top = y + 54
    side = _picture_height(showing)
    for column, row in enumerate(showing.rows):
        x = MARGIN + column * (CELL + GAP)
        _cell(sheet, pen, row, x, top, side)
        if row.fewer is not None:
            _cell(sheet, pen, row.fewer, x, top + side + CAPTION, side)
    if any(row.fewer for row in showing.rows):
        _legend(pen, MARGIN, top + side + CAPTION, showing)


def _cell(sheet: Image, pen: ImageDraw, row: Row, x: int, y: int, side: int) -> None:
    from PIL.Image import Resampling

    picture = row.drawing.images[0].convert("RGB").resize((CELL, side), Resampling.LANCZOS)
    sheet.paste(picture, (x, y))
    report = row.drawing.report
    evaluations = len(report.evaluations) or row.steps
    figures = f"{row.computed} of {evaluations} computed · {row.drawing.wall_s:.1f} s"
    likeness = f"{row.likeness.psnr_words} · SSIM {row.likeness.ssim:.3f}"
    if row.kind == "baseline":
        likeness = "the measure of the others"
    else:
        figures += f" · {row.speedup:.1f}x"
    colours = COLOURS | ({"C": RIVAL} if row.kind == "fewer" else {})
    _strip(pen, row.strip, x, y + side + 6, colours)
    pen.text((x, y + side + 18), row.name, RIVAL if row.kind == "fewer" else INK, font=_font(17))
    pen.text((x, y + side + 40), _fitted(pen, figures, CELL, 13), MUTED, font=_font(13))
    pen.text((x, y + side + 57), _fitted(pen, likeness, CELL, 13), MUTED, font=_font(13))


def _strip(pen: ImageDraw, strip: str, x: int, y: int, colours: Mapping[str, str]) -> None:
    """A bar as wide as the picture, one cell for each evaluation."""
    if not strip:
        return
    step = CELL / len(strip)
    for i, letter in enumerate(strip):
        pen.rectangle((x + round(i * step), y, x + round((i + 1) * step) - 2, y + 6), colours[letter])


def _legend(pen: ImageDraw, x: int, y: int, showing: Showing) -> None:
    """The corner under the plain run, where no rival stands."""
    lines = [
        "Upper row: the same seed,",
        f"{showing.request.steps} steps, some of them reused.",
        "Lower row: nothing reused,",
        "only as many steps as were",
        "computed above.",
        "",
        "dB and SSIM: nearness to the",
        "uncached picture; more is nearer.",
    ]
    for i, line in enumerate(lines):
        pen.text((x, y + 4 + i * 20), line, MUTED, font=_font(14))
    top = y + 4 + len(lines) * 20 + 10
    for i, (colour, word) in enumerate(((COMPUTED, "computed"), (REUSED, "reused"), (RIVAL, "plain"))):
        pen.rectangle((x + i * 92, top + 4, x + 12 + i * 92, top + 10), colour)
        pen.text((x + 18 + i * 92, top - 2), word, MUTED, font=_font(14))


def _height(showing: Showing) -> int:
    lines = 2 if any(row.fewer for row in showing.rows) else 1
    return 54 + lines * (_picture_height(showing) + CAPTION) + 16


def _picture_height(showing: Showing) -> int:
    return round(CELL * showing.request.height / showing.request.width)


def _fitted(pen: ImageDraw, text: str, width: int, size: int) -> str:
    """The text, cut with an ellipsis where it is wider than that many pixels."""
    if pen.textlength(text, font=_font(size)) <= width:
        return text
    while text and pen.textlength(text + "…", font=_font(size)) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _font(size: int) -> Any:
    """Pillow's own face, so that the sheet looks alike on every machine."""
    from PIL import ImageFont

    return ImageFont.load_default(size)
