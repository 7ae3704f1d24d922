"""The real ComfyUI as a server: the pack as it is cloned into custom_nodes, a template run over HTTP, the line read."""

from __future__ import annotations

import io
import json
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from comfyui.serving import FLUX_NANO, ROOT, Server
from PIL import Image

pytestmark = [pytest.mark.comfy, pytest.mark.slow, pytest.mark.filterwarnings("default")]


WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")  # inputs that stand on the node; all others are sockets


def prompt(seed: int, *, steps: int = 12, **fast: Any) -> dict[str, Any]:
    """The flux-nano template as the API takes it. fast: the node between loader and sampler."""
    kind = fast.pop("kind", "Lightning")
    return {
        "1": {"class_type": "LoadFluxNano", "inputs": {}},
        "2": {"class_type": kind, "inputs": {"model": ["1", 0], **fast}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red circle"}},
        "4": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["3", 0], "guidance": 3.5}},
        "5": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "6": {"class_type": "KSampler", "inputs": {
            "model": ["2", 0], "positive": ["4", 0], "negative": ["3", 0], "latent_image": ["5", 0], "seed": seed,
            "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}},
        "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
        "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "t"}},
        "9": {"class_type": "LightningReport", "inputs": {"model": ["2", 0], "samples": ["6", 0]}},
    }  # fmt: skip


def test_the_pack_is_imported_without_a_complaint(server: Server) -> None:
    listed = server.get("/object_info")
    ours = {name for name, info in listed.items() if info["category"] == "Lightning"}
    assert {"Lightning", "LoadFluxNano", "ApplyFBCacheAndSkipBlocks"} <= ours
    log = server.log.read_text()
    assert "ComfyUI-Lightning could not load" not in log
    assert "(IMPORT FAILED): " not in [line for line in log.splitlines() if "Lightning" in line]


def test_templates_and_help_are_served(server: Server) -> None:
    names = server.get("/api/workflow_templates")["ComfyUI-Lightning"]
    assert {"flux-nano try-out", "FLUX.1-dev", "FLUX.1-schnell", "Original pack example"} <= set(names)
    address = f"http://{server.address}/extensions/ComfyUI-Lightning/docs/Lightning.md"
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert answer.read().startswith(b"# ")


@pytest.mark.parametrize("file", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda file: file.stem)
def test_templates_have_a_picture_and_values_that_this_comfyui_takes(server: Server, file: Path) -> None:
    listed = server.get("/object_info")
    for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]:
        if node["type"] == "MarkdownNote":  # the page's own
            continue
        info = listed[node["type"]]["input"]
        widgets = [(name, spec) for part in ("required", "optional") for name, spec in info.get(part, {}).items()]
        given = list(node["widgets_values"])
        for name, spec in widgets:
            kind, rules = spec[0], spec[1] if len(spec) > 1 else {}
            if isinstance(kind, str) and kind not in WIDGETS:
                continue  # a socket
            if not given and name in info.get("optional", {}):
                continue  # ours, behind the original pack's: its workflows lack it
            value = given.pop(0)
            if kind in ("INT", "FLOAT"):
                assert rules.get("min", value) <= value <= rules.get("max", value), (node["type"], name)
            elif kind == "COMBO" or isinstance(kind, list):
                assert value in (kind if isinstance(kind, list) else rules["options"]), (node["type"], name)
            else:
                assert isinstance(value, bool if kind == "BOOLEAN" else str), (node["type"], name)
            if rules.get("control_after_generate") or name in ("seed", "noise_seed"):
                assert given.pop(0) == "fixed"  # a template draws the same picture for everyone
        assert given == [], node["type"]
    picture = f"http://{server.address}/api/workflow_templates/ComfyUI-Lightning/{quote(file.stem)}.jpg"
    with urllib.request.urlopen(picture, timeout=30) as answer:
        assert answer.read(2) == b"\xff\xd8"


needs_nano = pytest.mark.skipif(not (FLUX_NANO / "model_index.json").is_file(), reason="flux-nano is not here yet")


@needs_nano
def test_a_run_shows_its_line_on_the_node_and_in_the_report(server: Server) -> None:
    fast = {"kind": "ApplyFBCacheAndSkipBlocks", "fbcache_threshold": 0.3, "skip_DoubleStreamBlocks": "",
            "skip_SingleStreamBlocks": "", "start": 0.0, "end": 1.0, "max_consecutive_cache_hits": -1}  # fmt: skip
    counts = []
    for seed in (1, 2):
        outputs, lines = server.run(prompt(seed, **fast))
        line = lines["2"][-1]
        assert line.startswith("computed ") and " of 12 · about " in line
        assert outputs["9"]["text"][0].splitlines()[0] == line
        assert outputs["8"]["images"]
        counts.append(int(line.split()[1]))
    # The node's output stays cached when only the seed changes: reuse must not wear off.
    assert max(counts) < 12 and abs(counts[0] - counts[1]) <= 2


def pixels(server: Server, outputs: dict[str, Any]) -> Any:
    """The saved picture without the workflow that is written into its file."""
    return np.asarray(Image.open(io.BytesIO(server.picture(outputs, "8"))))


@needs_nano
def test_a_stopped_run_says_so_and_the_next_one_is_as_if_it_were_the_first(server: Server) -> None:
    first, _ = server.run(prompt(11, recipe="fast", threshold=-1.0, steps=60))
    _, lines = server.run(prompt(12, recipe="fast", threshold=-1.0, steps=200), interrupt_at=5)
    assert "did not come to its end" in lines["2"][-1]
    server.run(prompt(13, recipe="fast", threshold=-1.0, steps=12))
    again, _ = server.run(prompt(11, recipe="fast", threshold=-1.0, steps=60))
    assert np.array_equal(pixels(server, again), pixels(server, first))


@needs_nano
def test_bypassing_the_node_gives_stocks_picture(server: Server) -> None:
    """What the page sends for a bypassed node is the graph without it."""
    without = prompt(21)
    del without["2"], without["9"]
    without["6"]["inputs"]["model"] = ["1", 0]
    stock, _ = server.run(without)
    fast, _ = server.run(prompt(21, recipe="turbo", threshold=-1.0))
    assert not np.array_equal(pixels(server, fast), pixels(server, stock))
    without["8"]["inputs"]["filename_prefix"] = "again"
    without["6"]["inputs"]["seed"] = 22
    server.run(without)
    without["6"]["inputs"]["seed"] = 21
    again, _ = server.run(without)
    assert np.array_equal(pixels(server, again), pixels(server, stock))


@needs_nano
def test_the_original_packs_example_runs(server: Server) -> None:
    """The template as it is, with flux-nano in the place of the files that it asks for, at its size."""
    file = ROOT / "example_workflows" / "Original pack example.json"
    graph = as_prompt(server, json.loads(file.read_text(encoding="utf-8")))
    loaders = {"UNETLoader": 0, "DualCLIPLoader": 1, "VAELoader": 2}
    slots = {key: loaders[node["class_type"]] for key, node in graph.items() if node["class_type"] in loaders}
    for key in slots:
        del graph[key]
    graph["nano"] = {"class_type": "LoadFluxNano", "inputs": {}}
    for node in graph.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in slots:
                node["inputs"][name] = ["nano", slots[value[0]]]
            elif name in ("width", "height"):
                node["inputs"][name] = 128
    outputs, lines = server.run(graph)
    kinds = {node["class_type"]: key for key, node in graph.items()}
    assert outputs[kinds["SaveImage"]]["images"]
    said = {kind: lines[key][-1] for kind, key in kinds.items() if key in lines}
    assert said["ApplyFBCacheAndSkipBlocks"].startswith("computed ")
    assert "on the skip list not found" in said["ApplyFBCacheAndSkipBlocks"]  # flux-nano has no block 6
    assert "attention" in said["ApplySageAttention"]  # the back-end that it took, or why it took none
    assert "blocks are compiled" in said["CompileAndQuantizeModel"] or "not compiled" in said["CompileAndQuantizeModel"]


def as_prompt(server: Server, workflow: dict[str, Any]) -> dict[str, Any]:
    """What the page sends for a saved workflow: values by name, links by node and slot."""
    listed = server.get("/object_info")
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        info = listed[node["type"]]["input"]
        inputs = {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        given = list(node["widgets_values"])
        for name, spec in ((n, s) for part in ("required", "optional") for n, s in info.get(part, {}).items()):
            if given and name not in inputs and (isinstance(spec[0], list) or spec[0] in WIDGETS):
                inputs[name] = given.pop(0)
                if name in ("seed", "noise_seed"):
                    given.pop(0)  # "fixed"
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


@needs_nano
def test_bad_widgets_are_a_sentence_and_the_picture_still_comes(server: Server) -> None:
    fast = {"kind": "ApplyTeaCacheAndSkipBlocks", "do_teacache": True, "rel_l1_threshold": 0.4,
            "skip_DoubleStreamBlocks": "3,,x", "skip_SingleStreamBlocks": ""}  # fmt: skip
    outputs, lines = server.run(prompt(3, **fast))
    assert lines["2"][-1].startswith("left as it is: skip_DoubleStreamBlocks is '3,,x'")
    assert outputs["8"]["images"]
