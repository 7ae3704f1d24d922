"""What every test shares: tests whose machine is missing are skipped, and what was left out is said aloud."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

comfy_tests = pytest.StashKey[int]()


def comfyui_folder() -> Path | None:
    """The ComfyUI checkout that COMFYUI_DIR names or that lies in .comfyui/, or None."""
    folder = Path(os.environ.get("COMFYUI_DIR") or ROOT / ".comfyui")
    return folder.resolve() if (folder / "main.py").is_file() else None


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI checkout that the `comfy` tests run in."""
    folder = comfyui_folder()
    assert folder is not None, "tests that ask for it carry @pytest.mark.comfy, which skips them without one"
    return folder


class RootIsNoPackage:
    """Keeps pytest from importing the root __init__.py, which is ComfyUI's door and no package of tests.

    A conftest beside the door would be imported through it, and one below is not asked about the root:
    only a plugin without a place is.
    """

    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RootIsNoPackage(), "root-is-no-package")


@pytest.hookimpl(tryfirst=True)  # before -m takes any test away: those are counted too
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    comfy = [item for item in items if item.get_closest_marker("comfy")]
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.stash[comfy_tests] = len(comfy)
    if comfyui_folder() is None:
        for item in comfy:
            item.add_marker(pytest.mark.skip(reason="no ComfyUI: set COMFYUI_DIR or put one into .comfyui/"))
    if gpu and not _has_cuda():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash.get(comfy_tests, 0)
    if left_out and comfyui_folder() is None:
        terminalreporter.section("ComfyUI", sep="!", yellow=True, bold=True)
        terminalreporter.line(
            f"{left_out} ComfyUI tests were LEFT OUT, for there is neither COMFYUI_DIR nor .comfyui/: "
            "run `make test-comfyui COMFYUI_DIR=path`."
        )


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
