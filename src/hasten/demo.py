"""The first thing a newcomer runs: a small FLUX and a small Sana drawn under every shipped recipe, beside themselves.

It chooses prompts, sizes and recipes, and gathers what page.py and sheet.py show; a Painter draws.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hasten.compare import Progress, compare_recipes, warm_up
from hasten.generate import png
from hasten.output import check_folder, write_files
from hasten.painter import Painter, Request
from hasten.recipe import Recipe, recipe_names
from hasten.showing import Demo, Showing

# In the words that flux-nano was taught: things, colours, places, grounds.
PROMPTS = (
    "a red apple on a blue table",
    "a large purple heart on a yellow striped background",
    "a panda face on a green gradient background",
    "a blue letter K at the top left on a pink background",
    "a soccer ball on a grey table",
    "a small orange star at the bottom right on a white background",
)
# The quick one ends within a minute on two CPU cores; --full is what flux-nano was trained for.
QUICK_PROMPTS, QUICK_SIDE, QUICK_STEPS = 2, 128, 28
# A picture takes a second: what else the machine does then would be a good part of it.
TAKES = 2
FULL_SIDE, FULL_STEPS = 256, 28
# Shown beside the first one: what it was trained for, one prompt unless all are asked for.
OTHER_MODEL, OTHER_SIDE, OTHER_STEPS, OTHER_GUIDANCE = "sana-nano", 256, 20, 4.5


def run_demo(
    painter: Painter, *, full: bool = False, other: Painter | None = None, progress: Progress | None = None
) -> Demo:
    """Draws every prompt plainly, under each shipped recipe, and in as many plain steps as each one computed.

    other: draws the first prompt too, or all of them, as sana-nano likes it.
    """
    side, steps = (FULL_SIDE, FULL_STEPS) if full else (QUICK_SIDE, QUICK_STEPS)
    prompts = PROMPTS if full else PROMPTS[:QUICK_PROMPTS]
    requests = [Request(prompt, steps=steps, width=side, height=side) for prompt in prompts]
    takes = 1 if full else TAKES
    shown = show(painter, requests, recipe_names(), takes=takes, progress=progress)
    if other is None:
        return shown
    also = [
        Request(prompt, steps=OTHER_STEPS, width=OTHER_SIDE, height=OTHER_SIDE, guidance=OTHER_GUIDANCE)
        for prompt in (PROMPTS if full else PROMPTS[:1])
    ]
    return replace(shown, other=show(other, also, recipe_names(), takes=takes, progress=progress))


def show(
    painter: Painter,
    requests: Sequence[Request],
    names: Sequence[str],
    *,
    takes: int = 1,
    progress: Progress | None = None,
) -> Demo:
    """Draws each request plainly and under each recipe. names: shipped names or files; takes: see compare_recipes."""
    if not names:
        raise ValueError("there is no recipe to show: hasten's recipes folder is empty; reinstall hasten.")
    recipes = [(str(name), Recipe.load(name)) for name in names]
    recipes = [(recipe.name or name, recipe) for name, recipe in recipes]
    warm_up(painter, requests[0], [recipe for _, recipe in recipes])
    showings = [Showing(r, compare_recipes(painter, r, recipes, takes=takes, progress=progress)) for r in requests]
    return Demo(painter, showings, {name: recipe.description for name, recipe in recipes})


def write_demo(demo: Demo, folder: Path) -> tuple[Path, Path]:
    """The paths of the page and of the contact sheet, both written, or none. Raises OSError."""
    from hasten.page import page

    index, sheet = folder / "index.html", folder / "contact-sheet.png"
    write_files({index: page(demo).encode(), sheet: png(sheet_of(demo)), folder / "demo.json": demo_json(demo)})
    return index, sheet


def demo_json(demo: Demo) -> bytes:
    """The figures of the page as JSON."""
    return (json.dumps(demo.to_dict(), indent=2, allow_nan=False) + "\n").encode()


def sheet_of(demo: Demo) -> Any:
    """The contact sheet, a PIL image."""
    from hasten.sheet import contact_sheet

    doubted = "the times are not to be trusted · "  # why is on the page and the terminal: the line here is short
    return contact_sheet(
        [(doubted * bool(part.doubt) + part.circumstances, part.showings) for part in demo.parts],
        title="hasten: the same seed, computed less",
    )


def check_demo_folder(folder: Path) -> None:
    """Returns when the demo can be written there. Raises OSError."""
    if folder.is_file():
        raise OSError(f"the output folder {folder} is a file: choose another folder.")
    check_folder(folder)
