"""The rules between rooms: which module of hasten may import what. Imports are parsed, never run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"


@dataclass(frozen=True)
class Room:
    """Modules under one rule. `hasten` and `packages` are prefixes: what they may import beside the stdlib."""

    modules: tuple[str, ...]
    hasten: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


DATA = ("data",)  # where shipped files lie: pathlib only
# can be worked out on paper
PAPER = ("recipe", "cache_section", "sections", "values", "anatomy", "moment", "plan", "policy", "predict", "unused")
TENSORS = ("signal", "tokens", "attention", "attention_backends", "attention_keys", "attention_streams", "marks")
INSIDE = ("kept", "inside", "taps", "parts", "walk", "in_part", "token_gate")  # caches that reach inside blocks
MEMORY = ("lane", "seam", "call", "session", "gate", "report", *INSIDE)
TRANSFORMS = ("quantize", "compile", "replay", "place", "recording", "blocks", "sparse")
ENGINE = (*DATA, *PAPER, "kernels", "capture", *TENSORS, *MEMORY, *TRANSFORMS)
REACH_HOSTS_BY_PROTOCOL = ("bench", "tune", "compare", "doctor")
HOSTS = ("hosts.diffusers", "hosts.comfy", "hosts.sana")

ROOMS = (
    Room(DATA),
    # tomli is the standard library's tomllib on Python 3.10.
    Room(("recipe",), hasten=(*DATA, *PAPER), packages=("numpy", "tomli")),
    Room(
        ("cache_section", "sections", "values", "anatomy", "policy", "predict", "unused"),
        hasten=PAPER,
        packages=("numpy",),
    ),
    Room(("moment", "plan"), hasten=PAPER),
    Room(("kernels",), hasten=("kernels",), packages=("torch", "triton")),
    Room(("signal", "tokens"), hasten=("kernels",), packages=("torch",)),
    Room(
        ("attention", "attention_backends", "attention_keys", "attention_streams"),
        hasten=("kernels", "attention", "attention_backends", "attention_keys", "marks"),
        packages=("torch", "sageattention", "flash_attn_interface", "spas_sage_attn", "comfy_kitchen"),
    ),
    Room(
        MEMORY,
        hasten=(*DATA, *PAPER, "kernels", "capture", *TENSORS, *MEMORY),
        packages=("numpy", "torch"),
    ),
    Room(("capture", "marks"), packages=("torch",)),
    Room(("quantize", "compile"), hasten=("recipe", "kernels"), packages=("torch", "torchao")),
    Room(("replay", "place", "recording"), hasten=("capture", "place", "recording"), packages=("torch",)),
    Room(("blocks",), hasten=("kernels", "quantize"), packages=("torch",)),
    Room(("sparse",), hasten=(*PAPER, "kernels", *TENSORS), packages=("torch", "safetensors")),
    # The package of hosts itself names them for those who reach a host through the protocol.
    Room(("hosts",), hasten=(*ENGINE, "hosts")),
    Room(
        ("hosts.diffusers",),
        hasten=(*ENGINE, "hosts.diffusers"),
        packages=("numpy", "torch", "safetensors", "PIL", "diffusers", "transformers", "accelerate"),
    ),
    Room(
        ("hosts.comfy",),
        hasten=(*ENGINE, "hosts.comfy", "__version__"),
        packages=(
            *("numpy", "torch", "safetensors", "PIL"),
            *("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "nodes", "node_helpers"),
            "transformers",  # flux-nano's text encoders; ComfyUI brings it
            *("torchao", "sageattention"),  # optional: their absence is a sentence on the node
        ),
    ),
    Room(
        ("hosts.comfy_sana",),
        hasten=(*ENGINE, *DATA, "hosts.comfy", "sana_weights", "sana_autoencoder"),
        packages=(
            *("torch", "comfy", "comfy_api", "folder_paths", "transformers"),
            *("diffusers", "accelerate"),  # its models are diffusers' own
        ),
    ),
    # What is parsed and printed, nothing that computes.
    Room(("cli",), hasten=("",), packages=("typer", "click", "rich")),
    Room(("__main__",), hasten=("cli",)),
)


def room_of(module: str) -> Room | None:
    """The rule of a module, by its longest prefix; None for the front of the house (generate, demo, ...)."""
    rooms = [(name, room) for room in ROOMS for name in room.modules if under(module, name)]
    return max(rooms, key=lambda found: len(found[0]))[1] if rooms else None


def under(module: str, prefix: str) -> bool:
    """Whether `module` is `prefix` or lies in it; a host may have several modules (hosts.comfy, hosts.comfy_nodes)."""
    within = (prefix + ".", prefix + "_") if prefix.startswith("hosts.") else (prefix + ".",)
    return not prefix or module == prefix or module.startswith(within)


def module_name(file: Path, source: Path) -> str:
    """`hosts.diffusers` for src/hasten/hosts/diffusers.py, "" for the package itself."""
    parts = file.relative_to(source / "hasten").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, source: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of all that a file imports: lazily, for types only and by import_module too."""
    parts = file.relative_to(source).with_suffix("").parts
    package = parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            origin = ".".join(base + ([node.module] if node.module else []))
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def trespasses(source: Path) -> list[str]:
    """One line for each import under `source` that the rules do not allow."""
    found = []
    for file in sorted((source / "hasten").rglob("*.py")):
        module = module_name(file, source)
        room = room_of(module)
        for line, name in imports_of(file, source):
            top, _, inner = name.partition(".")
            if top == "hasten":
                allowed = _may_enter(module, room, inner)
            else:
                allowed = room is None or top in sys.stdlib_module_names or top in room.packages
            if not allowed:
                found.append(f"{file.relative_to(source)}:{line}: {module or 'hasten'} must not import {name}")
    return found


def _may_enter(module: str, room: Room | None, wanted: str) -> bool:
    """Whether `module` may import hasten's `wanted`, a dotted name inside the package ("" is the package)."""
    if module in REACH_HOSTS_BY_PROTOCOL and any(under(wanted, host) for host in HOSTS):
        return False
    return room is None or any(under(wanted, name) for name in room.hasten)


def test_no_module_imports_from_a_room_that_is_closed_to_it() -> None:
    assert trespasses(SOURCE) == []


def test_every_named_room_has_one_rule() -> None:
    named = [name for room in ROOMS for name in room.modules]
    assert sorted(named) == sorted(set(named))
    assert set(ENGINE) <= set(named)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("policy", "import torch"),
        ("plan", "import numpy as np"),
        ("predict", "from hasten.session import Session"),
        ("moment", "from . import gate"),
        ("kernels/sums", "from hasten.recipe import Recipe"),
        ("signal", "from hasten.hosts import diffusers"),
        ("gate", "def lazily():\n    import diffusers"),
        ("session", "import importlib\nhost = importlib.import_module('hasten.hosts.diffusers')"),
        ("compile", "from hasten.gate import Gate"),
        ("hosts/comfy", "from hasten.hosts.diffusers import accelerate"),
        ("hosts/diffusers", "from .comfy import apply"),
        ("hosts/diffusers", "import comfy.sd"),
        ("hosts/comfy_nodes", "import diffusers"),
        ("cli", "import torch"),
        ("doctor", "from hasten.hosts.diffusers import accelerate"),
        ("compare", "from hasten.hosts import comfy"),
    ],
)
def test_a_trespass_is_found(tmp_path: Path, module: str, line: str) -> None:
    file = tmp_path / "hasten" / f"{module}.py"
    file.parent.mkdir(parents=True)
    file.write_text("import math\n" + line + "\n", encoding="utf-8")
    assert len(trespasses(tmp_path)) == 1


# They derive classes of ComfyUI's, and are imported whole as a node runs.
AS_A_NODE_RUNS = ("comfy_sana", "comfy_sana_network", "comfy_sana_text", "comfy_sana_vae")


def test_at_import_the_comfyui_host_asks_comfyui_for_the_node_api_alone() -> None:
    """What changes in one model family of ComfyUI must not take the pack down: all else is imported as a node runs."""
    for file in (SOURCE / "hasten" / "hosts").glob("comfy*.py"):
        if file.stem in AS_A_NODE_RUNS:
            continue
        at_import = [n for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.ImportFrom)]
        plain = [n for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.Import)]
        names = {str(n.module) for n in at_import} | {alias.name for n in plain for alias in n.names}
        comfyui = {name for name in names if name.split(".")[0] in ("comfy", "comfy_api", "comfy_extras", "nodes")}
        assert comfyui <= {"comfy_api.latest"}, file.name
        assert not names & {f"hasten.hosts.{late}" for late in AS_A_NODE_RUNS}, file.name
