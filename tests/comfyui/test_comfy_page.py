"""The page in a real browser: templates loaded and run, the line read where the user reads it, old workflows kept.

SCREENSHOTS=folder keeps what the browser saw: docs/comfyui.png and the templates' pictures come from there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from comfyui.serving import FLUX_NANO, ROOT

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PLAYWRIGHT = os.environ.get("PLAYWRIGHT")
TEMPLATES = sorted(file.stem for file in (ROOT / "example_workflows").glob("*.json"))
TRY_OUT = "flux-nano try-out"

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(
        not (CHROMIUM and PLAYWRIGHT), reason="no chromium, or PLAYWRIGHT does not name a folder with playwright-core"
    ),
    pytest.mark.skipif(not (FLUX_NANO / "model_index.json").is_file(), reason="flux-nano is not here"),
]

# The original pack's nodes as its users' workflows hold them: values in the order of its widgets.
SAVED: dict[str, list[Any]] = {
    "ApplyTeaCacheAndSkipBlocks": ["3,6", "1", True, 0.6],
    "ApplyFBCacheAndSkipBlocks": ["3,6,8,12", "", 0.25, 0, 1, -1],
    "ApplyMBCacheAndSkipBlocks": ["", "5", 0.2, "0.1,,0.3", 0.1, 0.9, -1],
    "ApplySageAttention": [True],
    "CompileAndQuantizeModel": [True, True, False, "inductor"],
}
MEANT: dict[str, dict[str, Any]] = {
    "ApplyTeaCacheAndSkipBlocks": {
        "skip_DoubleStreamBlocks": "3,6", "skip_SingleStreamBlocks": "1", "do_teacache": True, "rel_l1_threshold": 0.6,
    },
    "ApplyFBCacheAndSkipBlocks": {
        "skip_DoubleStreamBlocks": "3,6,8,12", "skip_SingleStreamBlocks": "", "fbcache_threshold": 0.25,
        "start": 0, "end": 1, "max_consecutive_cache_hits": -1,
    },
    "ApplyMBCacheAndSkipBlocks": {
        "skip_DoubleStreamBlocks": "", "skip_SingleStreamBlocks": "5", "default_cache_threshold": 0.2,
        "dsb_cache_thresholds": "0.1,,0.3", "start": 0.1, "end": 0.9, "max_consecutive_cache_hits": -1,
    },
    "ApplySageAttention": {"use_SageAttention": True},
    # The page fills our added input with its default: off.
    "CompileAndQuantizeModel": {
        "do_compile": True, "dynamic": True, "fullgraph": False, "backend": "inductor", "quantize_model": False,
    },
}  # fmt: skip
COMMON = ["predictor", "start", "end", "max_consecutive_hits", "skip_double", "skip_single"]


def saved() -> dict[str, Any]:
    """A workflow with every node of SAVED, as the original pack's page wrote it."""
    nodes = []
    for i, (kind, values) in enumerate(SAVED.items()):
        sockets = ["model", "vae"] if kind.startswith("Compile") else ["model"]
        nodes.append({
            "id": i + 1, "type": kind, "pos": [40, 40 + 260 * i], "size": [330, 200], "flags": {}, "order": i,
            "mode": 0,
            "inputs": [{"name": name, "type": name.upper(), "link": None} for name in sockets],
            "outputs": [{"name": name.upper(), "type": name.upper(), "links": None} for name in sockets],
            "properties": {"Node name for S&R": kind}, "widgets_values": values,
        })  # fmt: skip
    return {"last_node_id": len(nodes), "last_link_id": 0, "nodes": nodes, "links": [], "groups": [], "config": {},
            "extra": {}, "version": 0.4}  # fmt: skip


@pytest.fixture(scope="module")
def seen(server: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the browser saw, all in one visit."""
    folder = tmp_path_factory.mktemp("page")
    pictures = Path(os.environ.get("SCREENSHOTS") or folder)
    pictures.mkdir(parents=True, exist_ok=True)
    # As the page's template browser asks for them.
    names = sorted(TEMPLATES, key=lambda name: name != TRY_OUT)  # first, while the page has no other open
    graphs = {name: server.get(f"/api/workflow_templates/ComfyUI-Lightning/{name}.json") for name in names}
    plan = folder / "plan.json"
    more = {Path(file).stem: json.loads(Path(file).read_text()) for file in os.environ.get("WORKFLOWS", "").split()}
    plan.write_text(json.dumps({"graphs": {**graphs, "saved": saved(), **more}, "run": [TRY_OUT], "recipe": True}))
    command = ["node", str(Path(__file__).with_name("page.mjs")), f"http://{server.address}", str(plan), str(pictures)]
    environment = {**os.environ, "CHROMIUM": str(CHROMIUM)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    (folder / "seen.json").write_text(done.stdout)
    return found


def test_the_template_runs_and_the_line_is_on_the_node(seen: dict[str, Any]) -> None:
    assert seen["ended"][TRY_OUT] == "execution_success"
    assert seen["lines"][TRY_OUT]["Lightning"].startswith("computed ")
    assert seen["lines"][TRY_OUT]["LightningReport"].startswith("computed ")


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_node_of_every_template_is_known(seen: dict[str, Any], name: str) -> None:
    assert set(seen["graphs"][name]["unknown"]) <= {"MarkdownNote"}
    assert seen["graphs"][name]["output"]


def test_workflows_of_the_original_pack_load_unchanged(seen: dict[str, Any]) -> None:
    sent = {node["class_type"]: node["inputs"] for node in seen["graphs"]["saved"]["output"].values()}
    assert sent == MEANT
    example = {n["class_type"]: n["inputs"] for n in seen["graphs"]["Original pack example"]["output"].values()}
    for kind in ("ApplyFBCacheAndSkipBlocks", "ApplySageAttention", "CompileAndQuantizeModel"):
        values = {name: value for name, value in example[kind].items() if not isinstance(value, list)}
        assert values == MEANT[kind]


def test_lightning_recipe_shows_what_its_method_has(seen: dict[str, Any]) -> None:
    found = seen["recipe"]
    for method, names in found["methods"].items():
        own = {"mbcache": ["threshold", "thresholds"], "interval": ["every", "growth"]}.get(method, ["threshold"])
        wanted = {"file": ["file"], "none": ["skip_double", "skip_single"]}.get(method, [*own, *COMMON, "order"])
        assert sorted(names) == sorted(["method", *wanted]), method
    assert found["held"] == found["reloaded"] == ["method", "threshold", *COMMON]


def test_lightning_recipe_keeps_the_values_of_hidden_inputs(seen: dict[str, Any]) -> None:
    inputs = seen["recipe"]["inputs"]
    kept = {name: inputs[name] for name in ("method", "predictor", "threshold", "every", "max_consecutive_hits")}
    assert kept == {
        "method": "fbcache", "predictor": "hold", "threshold": 0.12, "every": 7, "max_consecutive_hits": -1,
    }  # fmt: skip
