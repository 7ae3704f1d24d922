"""The page in a real browser: a template loaded and run, and the result line read where the user reads it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from comfyui.serving import FLUX_NANO, ROOT

pytestmark = [pytest.mark.comfy, pytest.mark.slow, pytest.mark.filterwarnings("default")]

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PLAYWRIGHT = os.environ.get("PLAYWRIGHT")


@pytest.mark.skipif(not (CHROMIUM and PLAYWRIGHT), reason="no chromium, or PLAYWRIGHT does not name playwright-core")
@pytest.mark.skipif(not (FLUX_NANO / "model_index.json").is_file(), reason="flux-nano is not here yet")
def test_the_template_runs_and_the_line_is_on_the_node(server: Any, tmp_path: Path) -> None:
    template = ROOT / "example_workflows" / "flux-nano try-out.json"
    picture = Path(os.environ.get("SCREENSHOT") or tmp_path / "page.png")
    command = [
        "node",
        str(Path(__file__).with_name("page.mjs")),
        f"http://{server.address}",
        str(template),
        str(picture),
    ]
    environment = {**os.environ, "CHROMIUM": str(CHROMIUM)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    assert seen["ended"] == "execution_success"
    assert seen["lines"]["Lightning"].startswith("computed ")
    assert picture.stat().st_size > 10_000
