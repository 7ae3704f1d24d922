"""The page needs nothing but itself, and shows every figure; the sheet has every picture."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fakes import FakePainter

from hasten.compare import compare_recipes
from hasten.demo import check_demo_folder, run_demo, sheet_of, show, write_demo
from hasten.page import page
from hasten.painter import Request
from hasten.recipe import Recipe
from hasten.sheet import CELL, MARGIN
from hasten.showing import Demo, Showing

COMPUTED = {"mild": 12, "strong": 6, "poor": 16}


@pytest.fixture(scope="module")
def demo() -> Demo:
    painter = FakePainter(COMPUTED)
    recipes = [(name, Recipe(name=name, description=f"{name} & <kind>")) for name in COMPUTED]
    requests = [Request(prompt, steps=20, width=64, height=48) for prompt in ("a <b>bold</b> apple", "a ball")]
    showings = [Showing(request, compare_recipes(painter, request, recipes)) for request in requests]
    return Demo(painter, showings, {name: recipe.description for name, recipe in recipes})


class Tags(HTMLParser):
    """Collects start tags with their attributes, and checks that every tag that must be closed is."""

    VOID = ("meta", "img", "br", "path", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(demo: Demo) -> None:
    text = page(demo)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert not any(tag in ("script", "link", "iframe") for tag, _ in tags.found)
    images = [attributes["src"] for tag, attributes in tags.found if tag == "img"]
    assert len(images) == 2 * (1 + 3 + 3)
    assert all(source and source.startswith("data:image/png;base64,") for source in images)
    assert "http" not in re.sub(r'"data:[^"]*"', "", text)
    assert "prefers-color-scheme" in text and 'name="viewport"' in text


def test_the_page_says_what_happened_in_every_row(demo: Demo) -> None:
    text = page(demo)
    assert "a &lt;b&gt;bold&lt;/b&gt; apple" in text and "<b>bold" not in text
    assert "mild &amp; &lt;kind&gt;" in text
    for words in ("12 of 20 computed", "12 plain steps", "6 of 20 computed", "6 plain steps", "64x48", "20 steps"):
        assert words in text
    assert text.count('class="strip"') == 14
    assert "computed in steps 1, 2, 3, 4, 5, 6 of 20" in text


def test_the_page_is_honest_when_plain_steps_come_nearer(demo: Demo) -> None:
    text = page(demo)
    assert text.count("dB nearer than the same number of plain steps") == 4
    assert text.count("dB further off than the same number of plain steps") == 2
    assert text.count('class="up"') == 2 and text.count('class="down"') == 1


def test_the_sheet_has_a_column_for_each_way(demo: Demo) -> None:
    sheet = sheet_of(demo)
    assert sheet.width == 2 * MARGIN + 4 * CELL + 3 * 20
    assert sheet.getpixel((5, 5)) == (250, 249, 247)
    assert len(sheet.getcolors(maxcolors=1 << 24)) > 1000


def test_everything_is_written_together(demo: Demo, tmp_path: Path) -> None:
    index, sheet = write_demo(demo, tmp_path / "out" / "demo")
    names = sorted(path.name for path in index.parent.iterdir())
    assert names == ["contact-sheet.png", "demo.json", "index.html"]
    assert sheet.read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "out" / "demo" / "demo.json").read_text())
    assert [line["name"] for line in figures["averages"]] == ["uncached", "mild", "strong", "poor"]


def test_the_demo_shows_every_shipped_recipe() -> None:
    from hasten.recipe import recipe_names

    names = recipe_names()
    if not names:
        with pytest.raises(ValueError, match="no recipe to show"):
            run_demo(FakePainter())
        return
    shown = run_demo(FakePainter())
    assert [average.name for average in shown.averages] == ["uncached", *names]
    assert len(shown.showings) == 2


def test_a_recipe_file_is_shown_under_its_own_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('schema = 1\ndescription = "my own"\n')
    shown = show(FakePainter(), [Request("x", steps=4)], [str(path)])
    assert shown.averages[1].name == "mine" and shown.descriptions == {"mine": "my own"}


def test_times_of_a_busy_machine_are_doubted_on_page_and_sheet() -> None:
    calm, busy = (
        show(FakePainter({"balanced": 12}, wall_s={28: 2.8, 12: wall_s}), [Request("x", steps=28)], ["balanced"])
        for wall_s in (1.2, 0.4)
    )
    assert calm.doubt == "" and "was busy" not in page(calm)
    assert "balanced 7.0x where 2.3x is the most" in page(busy) and busy.to_dict()["doubt"] == busy.doubt
    assert sheet_of(busy).tobytes() != sheet_of(calm).tobytes()


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(OSError, match="is a file"):
        check_demo_folder(tmp_path / "demo")


def test_another_model_stands_beside_the_first(tmp_path: Path) -> None:
    beside = FakePainter(COMPUTED)
    beside.model = "sana-fake"
    shown = run_demo(FakePainter(COMPUTED), other=beside)
    assert [len(part.showings) for part in shown.parts] == [2, 1]
    assert shown.parts[1].showings[0].request.guidance == 4.5
    text = page(shown)
    assert "The same on sana-fake" in text and text.count("<table>") == 2
    alone = run_demo(FakePainter(COMPUTED))
    assert "The same on" not in page(alone)
    assert sheet_of(shown).height > sheet_of(alone).height
    write_demo(shown, tmp_path / "demo")
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["other"]["model"] == "sana-fake"
