"""comfy_node.py is what every node of ours shares: its line on the page, refusals in one sentence, common inputs."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from hasten.hosts import comfy, comfy_lines
from hasten.recipe import Recipe

SKIP_TIP = "Double blocks that are not run, counted from 0, with commas. A skipped block keeps its ControlNet residual."
SINGLE_TIP = "Single blocks that are not run, counted from 0, with commas."
START_TIP = "Reuse begins here: 0 is pure noise, 1 the finished picture, in the model's own time."
END_TIP = "Reuse ends here, in the model's own time."
HITS_TIP = "At most so many steps in a row are reused; -1 is unlimited."


def model_input(tip: str = "The model that will be sampled; it is not changed, a clone leaves the node.") -> Any:
    return io.Model.Input("model", tooltip=tip)


def skips() -> list[Any]:
    """Right after the model: saved workflows keep widgets by their order, and the original nodes have this one."""
    return [
        io.String.Input("skip_DoubleStreamBlocks", default="3,6,8,12", tooltip=SKIP_TIP),
        io.String.Input("skip_SingleStreamBlocks", default="", tooltip=SINGLE_TIP),
    ]


def limits() -> list[Any]:
    return [
        io.Float.Input("start", default=0.0, min=0.0, max=1.0, step=0.01, tooltip=START_TIP),
        io.Float.Input("end", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=END_TIP),
        io.Int.Input("max_consecutive_cache_hits", default=-1, min=-1, tooltip=HITS_TIP),
    ]


class Lightning(io.ComfyNode):  # type: ignore[misc]
    """What every node of ours shares: its id for the line, and bad input as one sentence on the node."""

    TITLE = "Lightning"

    @classmethod
    def node_id(cls) -> str | None:
        """This node's id on the page; None where there is no page."""
        return getattr(cls.hidden, "unique_id", None)

    @classmethod
    def put(cls, model: Any, recipe: Recipe, remarks: list[str], percents: Any = None) -> Any:
        """A clone of the model that follows the recipe, its line shown on this node."""
        return comfy.put_recipe(model, recipe, node=cls.node_id(), title=cls.TITLE, remarks=remarks, percents=percents)

    @classmethod
    def passed_through(cls, reason: object, *outputs: Any) -> Any:
        """The inputs as they came, with the reason on the node: never a traceback for a value that can be mended."""
        comfy.tell(cls.node_id(), f"left as it is: {reason}")
        return io.NodeOutput(*outputs)

    @classmethod
    def told(cls, model: Any, kind: str, text: str, *, counts: bool = False) -> Any:
        """A clone of the model whose runs end with this line on this node; it stands there before the first, too."""
        cls.say(text)
        return comfy_lines.put_line(model, kind, text, node=cls.node_id(), title=cls.TITLE, counts=counts)

    @classmethod
    def say(cls, text: str) -> None:
        """One line on this node."""
        comfy.tell(cls.node_id(), text)
