"""What is handed to users: the wheel and the source archive, ComfyUI's requirements and door, one version."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest

import hasten

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("models", "recipes")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked(folder: str) -> set[str]:
    """The shipped files below `folder`, as paths inside the root; hidden files are nobody's product."""
    files = (file.relative_to(ROOT) for file in (ROOT / folder).rglob("*") if file.is_file())
    return {file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_carries_models_and_recipes(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    for folder in SHIPPED:
        for file in tracked(folder):
            assert sizes.get(f"hasten/_data/{file}") == (ROOT / file).stat().st_size, file
    for model in ("flux-nano", "sana-nano"):
        assert f"hasten/_data/models/{model}/model_index.json" in sizes
    assert "hasten/_data/recipes/balanced.toml" in sizes
    assert "hasten/py.typed" in sizes
    assert {name.partition("/")[0] for name in sizes} == {"hasten", f"hasten-{hasten.__version__}.dist-info"}


@pytest.mark.slow
def test_a_wheel_away_from_the_checkout_finds_its_own_recipes_and_models(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "bare"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index")
    run(*pip, "--target", target, wheel, cwd=tmp_path)
    told = run(
        sys.executable,
        "-c",
        "import hasten; print(hasten.__file__, hasten.recipe_folder(), hasten.models_folder(), "
        "hasten.Recipe.load('balanced').name, *hasten.recipe_names(), sep='\\n')",
        cwd=tmp_path,
        env={"PYTHONPATH": str(target), "PATH": ""},
    ).splitlines()
    places = [Path(line) for line in told[:3]]
    assert all(place.is_relative_to(target.resolve()) and place.exists() for place in places), told
    assert told[3:] == ["balanced", *hasten.recipe_names()]


@pytest.mark.slow
def test_the_source_archive_carries_models_and_recipes(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set().union(*map(tracked, SHIPPED)) | {"LICENSE", "pyproject.toml", "src/hasten/py.typed"} <= names


@pytest.mark.parametrize("name", ["recipe_folder", "models_folder"])
def test_a_missing_folder_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hasten.data

    monkeypatch.setattr(hasten.data, "PACKAGE", tmp_path / "site-packages" / "hasten")
    with pytest.raises(FileNotFoundError, match=r"^hasten's \w+ folder is missing at .*; reinstall hasten\.$"):
        getattr(hasten.data, name)()


def test_comfyui_requirements_never_name_torch() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line.strip() and not line.startswith("#")]
    assert wanted
    assert not [line for line in wanted if re.match(r"\s*(torch|triton|nvidia|-|http|git)", line)]


def test_constraints_pin_every_requirement_and_torch_without_a_local_build() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.match(r"[a-z0-9-]+==[0-9][0-9.a-z]*(; python_version (<|>=) \"3\.11\")?$", pin) for pin in pins)
    pinned = {pin.partition("==")[0] for pin in pins}
    declared = project()["project"]
    extras = declared["optional-dependencies"].values()
    required = [*declared["dependencies"], *(line for extra in extras for line in extra)]
    assert {re.split(r"[^A-Za-z0-9-]", line)[0] for line in required} <= pinned
    assert [pin for pin in pins if pin.startswith("torch==")] == ["torch==2.13.0"]


def test_the_version_is_written_once() -> None:
    declared = project()
    assert declared["project"]["dynamic"] == ["version"]
    assert "version" not in declared["project"]
    sources = {declared["tool"][tool]["version"]["path"] for tool in ("hatch", "comfy")}
    assert sources == {"src/hasten/__init__.py"}
    assigned = [
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "src").rglob("*.py")
        if re.search(r"^__version__\b.*=", file.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert assigned == ["src/hasten/__init__.py"]


# The door is tried in a process of its own: what it puts on the import path must not reach other tests.

PACK = "ComfyUI-Lightning v1.0 copy"  # a folder name that no import statement could spell

LOAD_THE_DOOR = """
import asyncio, importlib.util, logging, sys, types
from pathlib import Path

logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)

class ComfyExtension:
    async def get_node_list(self): return ["abstract"]

sys.modules["comfy_api"] = types.ModuleType("comfy_api")
sys.modules["comfy_api.latest"] = latest = types.ModuleType("comfy_api.latest")
latest.ComfyExtension = ComfyExtension

def load(pack):  # as ComfyUI does it
    name = pack.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, str(Path(pack) / "__init__.py"))
    sys.modules[name] = door = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(door)
    return door

def nodes(door):
    extension = asyncio.run(door.comfy_entrypoint())
    assert isinstance(extension, ComfyExtension)
    return asyncio.run(extension.get_node_list())
"""


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A clone of the pack with this door and an engine that is next to nothing."""
    folder = tmp_path / "custom_nodes" / PACK
    engine(folder / "src")
    (folder / "__init__.py").write_bytes((ROOT / "__init__.py").read_bytes())
    return folder


def engine(source: Path, nodes: str | None = None) -> None:
    (source / "hasten" / "hosts").mkdir(parents=True, exist_ok=True)
    (source / "hasten" / "__init__.py").write_text("")
    (source / "hasten" / "hosts" / "__init__.py").write_text("")
    if nodes is not None:
        (source / "hasten" / "hosts" / "comfy_nodes.py").write_text(textwrap.dedent(nodes))


def at_the_door(pack: Path, script: str) -> str:
    """What `script`, which may call load(pack) and nodes(door), prints and logs."""
    program = LOAD_THE_DOOR + f"pack = {str(pack)!r}\n" + textwrap.dedent(script)
    told = run(sys.executable, "-c", program, cwd=pack.parent)
    assert "Traceback" not in told
    return told


def test_the_door_takes_the_engine_of_its_own_clone(pack: Path) -> None:
    told = at_the_door(pack, "door = load(pack); import hasten; print(hasten.__file__, door.WEB_DIRECTORY)")
    assert told.split("\n")[0] == f"{pack / 'src' / 'hasten' / '__init__.py'} ./web"


def test_the_door_warns_of_a_second_hasten_and_uses_the_first(pack: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    engine(elsewhere)
    script = f"""
    sys.path.insert(0, {str(elsewhere)!r}); import hasten; first = hasten
    before = list(sys.path); load(pack); import hasten
    assert hasten is first and sys.path == before
    """
    warned = at_the_door(pack, script).splitlines()
    assert len(warned) == 1
    assert warned[0].startswith("WARNING ")
    assert str(elsewhere / "hasten") in warned[0]
    assert str(pack / "src" / "hasten") in warned[0]


def test_the_door_is_silent_when_its_own_engine_was_imported_before(pack: Path) -> None:
    script = "sys.path.insert(0, str(Path(pack) / 'src')); import hasten; load(pack); load(pack)"
    assert at_the_door(pack, script) == ""


def test_the_door_hands_over_the_nodes(pack: Path) -> None:
    engine(
        pack / "src",
        """
        from comfy_api.latest import ComfyExtension
        class Nodes(ComfyExtension):
            async def get_node_list(self): return ["Lightning"]
        def extension(): return Nodes()
        """,
    )
    assert at_the_door(pack, "print(nodes(load(pack)))") == "['Lightning']\n"


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (None, "has no ComfyUI nodes in this version"),
        ("import a_package_that_is_not_there", "needs the Python package a_package_that_is_not_there"),
        ("from comfy_api.latest import Renamed", "could not load its nodes: ImportError: cannot import name"),
        ("def extension(): raise RuntimeError('broken')", "could not load its nodes: RuntimeError: broken."),
        ("def (", "could not load its nodes: SyntaxError"),
    ],
)
def test_nodes_that_cannot_be_loaded_cost_one_sentence(pack: Path, nodes: str | None, reason: str) -> None:
    engine(pack / "src", nodes)
    said = at_the_door(pack, "print(nodes(load(pack)))").splitlines()
    assert len(said) == 2
    assert said[0].startswith("WARNING ComfyUI-Lightning ")
    assert reason in said[0]
    assert said[1] == "[]"


def test_a_comfyui_without_the_v3_schema_is_told_of(pack: Path) -> None:
    script = "del sys.modules['comfy_api.latest']; sys.modules['comfy'] = types.ModuleType('comfy'); load(pack)"
    assert at_the_door(pack, script) == (
        "WARNING ComfyUI-Lightning needs ComfyUI 0.3.48 or newer: update ComfyUI, then restart.\n"
    )


def test_pytest_never_imports_the_door() -> None:
    door = ROOT / "__init__.py"
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    assert door.is_file()
    assert not [file for file in files if file and Path(file) == door]
