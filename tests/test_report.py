"""A report says what happened, in one line, in JSON, and why nothing was reused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from hasten.report import Clock, Evaluation, Report


def evaluation(
    index: int, decision: str, reason: str = "change", *, ms: float = 10.0, change: float | None = 0.1
) -> Evaluation:
    sigma = 1.0 - index / 10
    return Evaluation(index, index, sigma, decision=decision, change=change, block=1, reason=reason, ms=ms)


def report(strip: str, **given: Any) -> Report:
    words = {"C": "compute", ".": "reuse", "P": "partial"}
    return Report(recipe={"schema": 1}, intervals=len(strip), evaluations=[
        evaluation(i, words[letter], ms=10.0 if letter == "C" else 1.0) for i, letter in enumerate(strip)
    ], **given)  # fmt: skip


@pytest.mark.parametrize("strip", ["", "C", "C..C.C", "CP.PC"])
def test_the_strip_has_a_letter_for_each_evaluation(strip: str) -> None:
    found = report(strip)
    assert found.strip == strip
    assert (found.computed, found.partial, found.reused) == tuple(map(strip.count, "CP."))


def test_the_line_says_what_was_computed_how_fast_and_what_it_kept() -> None:
    found = report("C..C..C..C", cache_mib=28.04)
    assert found.line() == "computed 4 of 10 · about 2.2x · cache 28.0 MiB"
    assert str(found) == found.line()


def test_the_line_says_why_nothing_was_reused() -> None:
    found = Report(recipe={"cache": {"method": "fbcache"}}, intervals=4, evaluations=[
        evaluation(0, "compute", "first", change=None),
        evaluation(1, "compute", "change 0.4, threshold 0.1", change=0.4),
        evaluation(2, "compute", "change 0.3, threshold 0.1", change=0.3),
        evaluation(3, "compute", "last", change=None),
    ])  # fmt: skip
    assert found.line() == "computed 4 of 4 · nothing reused: at the closest change 0.3, threshold 0.1"
    found.note("TeaCache cannot reuse anything at so low a threshold")  # what explains the figures comes before them
    assert found.line().endswith(
        " · TeaCache cannot reuse anything at so low a threshold · nothing reused: at the closest "
        "change 0.3, threshold 0.1"
    )
    found.notes.clear()
    found.evaluations = [evaluation(i, "compute", "no cache", change=None) for i in range(3)]
    assert found.line() == "computed 3 of 3 · nothing reused: no cache"
    found.evaluations = [evaluation(i, "compute", ("first", "last")[i], change=None) for i in range(2)]
    assert found.line() == "computed 2 of 2 · nothing reused: too few steps"


def test_a_recipe_without_a_cache_is_no_failure() -> None:
    found = report("CCC")
    found.recipe = {"schema": 1, "compile": {"blocks": True}}
    assert found.line() == "computed 3 of 3 · no cache asked for"


def test_a_report_in_a_shell_is_one_line() -> None:
    assert repr(report("C.")).startswith("<Report: computed 1 of 2 · ") and "\n" not in repr(report("C."))


def test_the_line_counts_the_blocks_that_were_skipped() -> None:
    found = report("CC")
    found.recipe = {"schema": 1, "skip": {"double": [3], "single": [1, 2]}}
    assert found.line().endswith("3 blocks skipped")


def test_a_remark_is_made_once_and_stands_in_the_line() -> None:
    found = report("C.")
    found.note("a remark")
    found.note("a remark")
    assert found.notes == ["a remark"]
    assert found.line().endswith("· a remark")


def test_the_speed_up_is_estimated_from_the_median_of_what_was_computed() -> None:
    found = report("C..C..C..C")
    found.evaluations[0].ms = 1000.0  # warming up: loads and compiles what stays
    assert found.estimated_speedup == pytest.approx(10.0 * 10 / (40.0 + 6.0))
    found.evaluations[1].ms = 500.0  # and the first stand-in its kernel
    assert found.estimated_speedup == pytest.approx(10.0 * 10 / (40.0 + 6.0))
    found.evaluations[5].ms = 31.0  # a later hiccup is time that was spent
    assert found.estimated_speedup == pytest.approx(10.0 * 10 / (40.0 + 36.0))
    assert report("").estimated_speedup == 1.0
    assert report("...").estimated_speedup == 1.0


def test_times_are_read_once_however_often_they_are_asked_for() -> None:
    found = report("CC")
    found.evaluations[1].times += [lambda: 2.0, lambda: 3.0]
    for _ in range(2):
        found.read_times()
        assert [e.ms for e in found.evaluations] == [10.0, 15.0]
        assert found.wall_s == pytest.approx(0.025)


def test_json_holds_every_evaluation_and_nothing_else() -> None:
    found = report("C.C", cache_mib=1.5, cache_mib_planned=2.0, notes=["so"])
    data = json.loads(found.to_json())
    assert data == found.to_dict()
    assert set(data) >= {"schema", "recipe", "evaluations", "computed", "reused", "wall_s", "cache_mib"}
    assert [e["decision"] for e in data["evaluations"]] == ["compute", "reuse", "compute"]
    keys = {"index", "interval", "sigma", "lanes", "decision", "change", "block", "reason", "ms"}
    assert all(set(e) == keys for e in data["evaluations"])


def test_the_clock_measures_what_lies_between_start_and_stop() -> None:
    clock = Clock()
    clock.start(torch.device("cpu"))
    sum(range(200_000))
    read = clock.stop()
    first = read()
    assert 0.0 < first < 60_000.0
    assert read() == first
