"""What a command line asks for: the model, and the request; both checked before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hasten.screen import Screen

if TYPE_CHECKING:
    from hasten.painter import FluxPainter
    from hasten.recipe import Recipe


def load(
    screen: Screen,
    where: Any,
    device: str,
    dtype: str,
    check: Callable[[], Any] | None = None,
    *,
    recipe: Recipe | None = None,
    threads: int | None = None,
) -> FluxPainter:
    """The loaded model, changed as a recipe asks; what can be found wrong without it is said before it is loaded."""
    from hasten.loading import check_model, is_on_hub, load_painter
    from hasten.machine import pick_device, pick_dtype, use_threads

    if check is not None:
        check()
    use_threads(threads)
    at = pick_device(device)
    kind = pick_dtype(dtype, at)
    check_model(where)
    if recipe is not None and recipe.quantize.format != "none":
        from hasten.quantize import format_for

        format_for(recipe.quantize.format, at)
    with screen.waiting(f"looking for {where.name} on the hub" if is_on_hub(where) else "loading the model"):
        return load_painter(where, device=at, dtype=kind, recipe=recipe)


def request_maker(prompt: str, size: str | None, options: dict[str, Any]) -> Callable[[FluxPainter | None], Any]:
    """Makes the request; without a painter only to see whether it is a right one."""
    from hasten.loading import SMALL, habits
    from hasten.painter import Request

    def make(painter: FluxPainter | None) -> Any:
        usual = SMALL if painter is None else habits(painter)
        width, height = (usual.side, usual.side) if size is None else _parsed_size(size)
        given = {name: value for name, value in options.items() if value is not None}
        return Request(
            prompt, width=width, height=height, **{"steps": usual.steps, "guidance": usual.guidance, **given}
        )

    return make


def _parsed_size(size: str) -> tuple[int, int]:
    width, cross, height = size.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise ValueError(f"the size is {size!r}: give width and height in pixels such as 1024x768.")
    return int(width), int(height)
