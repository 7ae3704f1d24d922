"""Doctor tries things, says why they fail, and never ends in a traceback."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from hasten import doctor
from hasten.doctor import Check, can_draw, examine


@pytest.fixture(scope="module")
def findings() -> dict[str, list[Check]]:
    return examine()


def named(findings: dict[str, list[Check]], room: str) -> dict[str, Check]:
    return {check.name: check for check in findings[room]}


def test_every_room_is_examined(findings: dict[str, list[Check]]) -> None:
    assert list(findings) == ["versions", "devices", "formats", "attention", "compiling", "hasten's files"]
    assert all(check.words for checks in findings.values() for check in checks)


def test_what_is_needed_is_found_here(findings: dict[str, list[Check]]) -> None:
    assert can_draw(findings)
    versions = named(findings, "versions")
    assert versions["torch"].ok and versions["diffusers"].ok and versions["python"].ok


def test_formats_and_kernels_are_tried(findings: dict[str, list[Check]]) -> None:
    assert named(findings, "formats")["float32"].ok
    attention = named(findings, "attention")
    assert attention["sdpa math"].ok
    assert {"flash-attn", "sageattention", "spas-sage-attn", "comfy-kitchen", "xformers"} <= set(attention)


def test_every_shipped_model_is_looked_at(findings: dict[str, list[Check]]) -> None:
    assert {"flux-nano", "sana-nano"} <= set(named(findings, "hasten's files"))


def test_without_what_is_needed_nothing_can_be_drawn() -> None:
    assert not can_draw({"versions": [Check("torch", False, "not installed", needed=True)]})
    assert can_draw({"versions": [Check("torchao", False, "not installed")]})


def test_an_absent_package_is_a_finding() -> None:
    assert doctor.package("no-such-package-anywhere") == Check(
        "no-such-package-anywhere", False, "not installed", False
    )


def test_a_package_that_breaks_when_imported_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    folder = tmp_path / "broken_attention_for_test.py"  # type: ignore[operator]
    folder.write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(doctor.ATTENTION, "broken_attention_for_test", "broken")
    check = doctor.attention_package("broken_attention_for_test")
    assert (check.ok, check.words) == (False, "undefined symbol: _ZN3c10")


def test_a_room_that_cannot_be_examined_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks() -> list[Check]:
        raise RuntimeError("driver too old\nwith a second line")

    assert doctor._guarded("devices", breaks) == [Check("devices", False, "driver too old")]


def test_an_old_torch_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SDPA", ("NOT_INVENTED_YET",))
    assert "does not have it" in doctor.sdpa_kernels()[0].words


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "install g++" in doctor.compiler().words


def test_a_package_without_a_file_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    # A module set to a stub has no spec, for which importlib raises ValueError.
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    assert isinstance(doctor.attention_package("xformers"), Check)
