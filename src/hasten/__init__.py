"""hasten: FLUX.1 image generation made several times faster, with an honest account of what it cost."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hasten.calibrate import calibrate as calibrate
    from hasten.data import models_folder as models_folder
    from hasten.data import recipe_folder as recipe_folder
    from hasten.hosts.diffusers import accelerate as accelerate
    from hasten.hosts.diffusers import apply as apply
    from hasten.hosts.diffusers import prepare as prepare
    from hasten.recipe import Recipe as Recipe
    from hasten.recipe import recipe_names as recipe_names
    from hasten.report import Report as Report

# Looked up on first use: `import hasten` and `hasten --help` stay instant, and neither torch nor diffusers is
# imported for someone who only reads recipes.
_PUBLIC = {
    "Recipe": "hasten.recipe",
    "Report": "hasten.report",
    "accelerate": "hasten.hosts.diffusers",
    "apply": "hasten.hosts.diffusers",
    "calibrate": "hasten.calibrate",
    "models_folder": "hasten.data",
    "prepare": "hasten.hosts.diffusers",
    "recipe_folder": "hasten.data",
    "recipe_names": "hasten.recipe",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    """What tab completion offers: the names above, before any of them was used."""
    return sorted(__all__)
