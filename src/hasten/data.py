"""Where the shipped recipes and models lie: the folders of a checkout, or the copies inside the wheel.

It knows folders only, never what a recipe or a model is.
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def recipe_folder() -> Path:
    """The folder of the shipped recipes (*.toml). Raises FileNotFoundError where it is missing."""
    return _shipped_folder("recipes")


def models_folder() -> Path:
    """The folder of the shipped models, one diffusers folder each. Raises FileNotFoundError where it is missing."""
    return _shipped_folder("models")


def _shipped_folder(name: str) -> Path:
    """`name` in the root of the checkout that this module belongs to, or else in the installed package."""
    checkout = PACKAGE.parents[1]
    # In site-packages two folders up may hold anything: only our own pyproject.toml makes a checkout.
    in_checkout = PACKAGE.parent.name == "src" and (checkout / "pyproject.toml").is_file()
    folder = checkout / name if in_checkout else PACKAGE / "_data" / name
    if folder.is_dir():
        return folder
    cure = "restore it with git" if in_checkout else "reinstall hasten"
    raise FileNotFoundError(f"hasten's {name} folder is missing at {folder}; {cure}.")
