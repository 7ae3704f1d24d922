"""Tests in the real ComfyUI: the checkout is made importable once, then models are tiny and random."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def rig(comfyui: Path) -> Any:
    """The real ComfyUI in this process."""
    from comfyui import rig

    rig.start(comfyui)
    return rig


@pytest.fixture
def model(rig: Any) -> Any:
    """A tiny random Flux as ComfyUI's MODEL."""
    return rig.tiny_model()


@pytest.fixture(scope="session")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """ComfyUI started from its checkout, with this checkout in its custom_nodes."""
    from comfyui.serving import started

    if not (comfyui / "requirements.txt").is_file():
        pytest.skip("this ComfyUI is a package: its server is not started from a checkout")
    yield from started(comfyui, tmp_path_factory.mktemp("comfyui"))
