"""ComfyUI's door to hasten: ComfyUI loads this file from custom_nodes, under whatever name the folder has.

The engine lives in `src` and is imported once, under the name `hasten`. Nothing heavy happens here, and
nothing here may raise: a pack that fails must never take ComfyUI's start down with a traceback.
"""

import importlib
import logging
import sys
from pathlib import Path
from typing import Any

WEB_DIRECTORY = "./web"

_log = logging.getLogger("hasten.door")
_source = Path(__file__).resolve().parent / "src"


def _choose_engine() -> None:
    """Puts this clone's `src` first on the import path, or warns that another hasten was imported before."""
    present = sys.modules.get("hasten")
    if present is None:
        if sys.path[:1] != [str(_source)]:
            sys.path.insert(0, str(_source))
        return
    used = Path(getattr(present, "__file__", None) or "an unknown place").parent.resolve()
    if used != _source / "hasten":
        _log.warning(
            "ComfyUI-Lightning uses the hasten that was already imported from %s, not its own in %s; "
            "remove one of the two if its nodes misbehave.",
            used,
            _source / "hasten",
        )


def _warn_of_an_old_comfyui() -> None:
    """Says why there are no nodes where ComfyUI never calls comfy_entrypoint: before its V3 schema."""
    if "comfy" in sys.modules and "comfy_api.latest" not in sys.modules:
        _log.warning("ComfyUI-Lightning needs ComfyUI 0.3.48 or newer: update ComfyUI, then restart.")


async def comfy_entrypoint() -> Any:
    """The pack's ComfyExtension; one without nodes, and a sentence in the log, when they cannot be loaded."""
    from comfy_api.latest import ComfyExtension

    class NoNodes(ComfyExtension):
        async def get_node_list(self) -> list[Any]:
            return []

    try:
        return importlib.import_module("hasten.hosts.comfy_nodes").extension()
    except ModuleNotFoundError as error:
        if error.name == "hasten.hosts.comfy_nodes":
            _log.warning("ComfyUI-Lightning has no ComfyUI nodes in this version; update the pack to get them.")
        else:
            _log.warning(
                "ComfyUI-Lightning needs the Python package %s: run pip install -r requirements.txt "
                "in its folder with ComfyUI's Python, then restart.",
                error.name,
            )
    except Exception as error:  # anything may break when ComfyUI moves on; the user needs the reason, not a trace
        _log.warning("ComfyUI-Lightning could not load its nodes: %s: %s.", type(error).__name__, error)
    return NoNodes()


_choose_engine()
_warn_of_an_old_comfyui()
