"""Recipes survive every form they travel in, and bad ones are refused in one sentence."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from hasten.anatomy import flux, sana
from hasten.plan import fitted_to
from hasten.recipe import METHODS, Attention, Cache, Recipe, Skip, recipe_names
from hasten.unused import FORECAST_BY, TAKEN_BY, unused

WORDS = ["", "plain", 'with "quotes" and \\ and \ttabs\nlines', "größer, 更快, 🍎", "\x7f\x01"]


def random_settings(rng: random.Random) -> dict[str, Any]:
    """A valid recipe with about half of its keys given."""
    method = rng.choice(METHODS)
    cache: dict[str, Any] = {"method": method}
    start, end = sorted((round(rng.random(), 3), rng.random()))
    some: dict[str, Any] = {
        "signal": rng.choice(["residual", "output"]),
        "relative_to": rng.choice(["previous", "current"]),
        "compare_with": rng.choice(["auto", "computed", "latest"]),
        "threshold": rng.choice([0, 0.0, 1e-7, 0.12, 10, rng.uniform(0, 10)]),
        "thresholds": [rng.uniform(0, 1) for _ in range(rng.randrange(5))],
        "of": 64,
        "every": rng.randrange(1, 9),
        "growth": rng.uniform(0, 3),
        "coefficients": [rng.uniform(-500, 500) for _ in range(rng.randrange(1, 6))],
        "start": start,
        "end": end,
        "sigma_start": 0.5 + 0.5 * rng.random(),
        "sigma_end": 0.5 * rng.random(),
        "max_consecutive_hits": rng.randrange(-1, 5),
        "first": rng.random() < 0.5,
        "last": rng.random() < 0.5,
        "order": rng.randrange(3),
        "degree": rng.randrange(1, 9),
        "ridge": rng.uniform(0, 1),
        "blend": rng.random(),
        "window": rng.randrange(2, 17),
        "reach": rng.uniform(0.01, 1),
        "device": rng.choice(["auto", "cpu"]),
        "dtype": rng.choice(["model", "float32"]),
        "predictor": rng.choice(["hold", "taylor", "chebyshev", "damped"]),
    }
    cache |= {key: value for key, value in some.items() if rng.random() < 0.5}
    if method == "schedule":
        cache["steps"] = sorted(rng.sample(range(64), rng.randrange(1, 20)))
        if rng.random() < 0.3:
            cache["predictor"] = "weights"
            cache["weights"] = [[rng.uniform(-2, 2) for _ in range(rng.randrange(1, 4))] for _ in range(3)]
    if method == "magcache":
        cache["ratios"] = [1.0, *(rng.uniform(0.8, 1.2) for _ in range(27))]
    data: dict[str, Any] = {"schema": 1, "cache": cache}
    if rng.random() < 0.5:
        data["skip"] = {"double": rng.sample(range(19), 3), "single": rng.sample(range(38), 2)}
    if rng.random() < 0.5:
        data["description"] = rng.choice(WORDS)
    return data


@pytest.mark.parametrize("seed", range(60))
def test_a_recipe_survives_toml_json_and_dict(seed: int, tmp_path: Path) -> None:
    data = random_settings(random.Random(seed))
    recipe = Recipe.load(data)
    for key, value in data["cache"].items():
        kept = getattr(recipe.cache, key)
        assert json.loads(json.dumps(kept)) == value, key
    assert Recipe.load(recipe.to_dict()) == recipe
    assert Recipe.load(json.loads(json.dumps(recipe.to_dict()))) == recipe
    for name, text in (("some.toml", recipe.to_toml()), ("some.json", json.dumps(recipe.to_dict()))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        loaded = Recipe.load(tmp_path / name)
        assert loaded == recipe
        assert loaded.description == recipe.description
        assert Recipe.load(str(tmp_path / name)) == recipe


def test_a_dict_holds_only_what_differs_from_the_defaults() -> None:
    assert Recipe().to_dict() == {"schema": 1}
    assert Recipe(cache=Cache(method="interval", every=4, growth=0.5)).to_dict() == {
        "schema": 1,
        "cache": {"method": "interval", "growth": 0.5},
    }


def test_every_key_but_schema_is_optional() -> None:
    assert Recipe.load({"schema": 1}) == Recipe()


def test_a_file_names_its_recipe_unless_it_names_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("schema = 1\n")
    assert Recipe.load(tmp_path / "mine.toml").name == "mine"
    (tmp_path / "mine.toml").write_text('schema = 1\nname = "other"\n')
    assert Recipe.load(tmp_path / "mine.toml").name == "other"


def test_a_recipe_is_frozen_and_equal_to_its_copies() -> None:
    recipe = Recipe.load({"schema": 1, "cache": {"method": "schedule", "steps": [0, 3]}})
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.cache = Cache()  # type: ignore[misc]
    assert copy.deepcopy(recipe) == recipe
    assert hash(copy.deepcopy(recipe)) == hash(recipe)
    assert Recipe.load(recipe) is recipe


def test_none_reuses_and_skips_nothing() -> None:
    recipe = Recipe.load("none")
    assert recipe == dataclasses.replace(Recipe(), description=recipe.description)
    assert recipe.name == "none"
    assert recipe.cache == Cache() and recipe.skip == Skip()


def test_every_shipped_recipe_loads_and_survives(tmp_path: Path) -> None:
    for name in recipe_names():
        recipe = Recipe.load(name)
        assert recipe.name == name
        (tmp_path / "copy.toml").write_text(recipe.to_toml(), encoding="utf-8")
        assert Recipe.load(tmp_path / "copy.toml") == recipe


def refused(data: Any) -> str:
    with pytest.raises(ValueError) as refusal:
        Recipe.load(data)
    sentence = str(refusal.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("cache", "treshold", "threshold"),
        ("cache", "methods", "method"),
        ("cache", "max_hits", "max_consecutive_hits"),
        ("skip", "doubles", "double"),
        (None, "caches", "cache"),
        (None, "schemas", "schema"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_offered(section: str | None, key: str, nearest: str) -> None:
    data = {"schema": 1, section: {key: 1}} if section else {"schema": 1, key: {}}
    sentence = refused(data)
    assert f"unknown key {key!r}" in sentence
    assert f"did you mean {nearest!r}" in sentence


def test_a_key_that_resembles_nothing_is_answered_with_the_list() -> None:
    assert "known are double, single" in refused({"schema": 1, "skip": {"qqqqqq": [1]}})


@pytest.mark.parametrize(
    ("key", "given", "nearest"),
    [
        ("method", "fbcach", "fbcache"),
        ("signal", "residuals", "residual"),
        ("predictor", "tailor", "taylor"),
        ("relative_to", "prev", "previous"),
        ("compare_with", "last", "latest"),
        ("device", "cpus", "cpu"),
        ("dtype", "float16", "float32"),
    ],
)
def test_an_unknown_word_is_refused_and_the_nearest_offered(key: str, given: str, nearest: str) -> None:
    sentence = refused({"schema": 1, "cache": {key: given}})
    assert repr(given) in sentence and f"did you mean {nearest!r}" in sentence


def test_an_unknown_name_is_refused_and_the_nearest_offered() -> None:
    assert "did you mean 'none'" in refused("nome")
    assert "did you mean" not in refused("speca")


OUT_OF_RANGE: list[dict[str, Any]] = [
    {"threshold": -0.1},
    {"threshold": 10.5},
    {"thresholds": [0.1, -1]},
    {"start": -0.1},
    {"end": 1.1},
    {"start": 0.6, "end": 0.5},
    {"max_consecutive_hits": -2},
    {"every": 0},
    {"growth": -1},
    {"order": 3},
    {"order": -1},
    {"degree": 0},
    {"degree": 9},
    {"ridge": -1},
    {"blend": 1.5},
    {"reach": 0.0},
    {"window": 1},
    {"window": 17},
    {"of": -1},
    {"steps": [-1]},
    {"method": "schedule", "steps": [28], "of": 28},
    {"method": "schedule"},
    {"method": "magcache"},
    {"method": "teacache", "coefficients": []},
    {"method": "schedule", "steps": [0], "predictor": "weights"},
    {"method": "schedule", "steps": [0], "weights": [[1.0]]},
    {"method": "interval", "predictor": "weights", "weights": [[1.0]]},
    {"method": "schedule", "steps": [0], "predictor": "weights", "weights": [[]]},
    {"method": "schedule", "steps": [0], "predictor": "weights", "weights": [[1.0] * 17]},
]


@pytest.mark.parametrize("cache", OUT_OF_RANGE, ids=str)
def test_what_is_out_of_range_is_refused(cache: dict[str, Any]) -> None:
    sentence = refused({"schema": 1, "cache": cache})
    assert "cache." in sentence


def test_skip_lists_count_from_zero() -> None:
    assert "blocks count from 0" in refused({"schema": 1, "skip": {"single": [3, -1]}})


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "cache",
    [
        *({key: value} for key in ("threshold", "start", "sigma_end") for value in (True, "0.1", NAN, INF, [0.1], {})),
        *({key: value} for key in ("every", "order", "window") for value in (False, "4", NAN, -INF, 2.5, 10**400)),
        *({key: value} for key in ("first", "last") for value in (0, 1, "true", None)),
        *({key: value} for key in ("method", "device") for value in (0, True, None, ["fbcache"])),
        *({key: value} for key in ("steps", "ratios", "thresholds") for value in (1, "12", None, [True], [NAN], ["1"])),
        {"weights": [1.0, 2.0]},
        {"weights": [["a"]]},
        {"threshold": 10**400},
        {"every": None},
    ],
    ids=lambda given: str(given)[:40],
)
def test_a_wrong_type_is_refused(cache: dict[str, Any]) -> None:
    key = next(iter(cache))
    assert f"cache.{key}" in refused({"schema": 1, "cache": cache})


def test_a_whole_number_may_be_written_with_a_point() -> None:
    cache = Recipe.load({"schema": 1, "cache": {"every": 3.0, "steps": [1.0]}}).cache
    assert (cache.every, cache.steps) == (3, (1,))
    assert isinstance(cache.every, int)


@pytest.mark.parametrize("data", [{}, {"cache": {"method": "none"}}])
def test_a_missing_schema_is_said_with_its_cure(data: dict[str, Any]) -> None:
    assert "schema = 1" in refused(data)


@pytest.mark.parametrize("schema", [0, 2, "1", None, True])
def test_another_schema_is_refused(schema: object) -> None:
    assert "schema" in refused({"schema": schema})


@pytest.mark.parametrize("data", [{"cache": 3}, {"skip": []}, {"description": 4}, {"name": ["a"]}])
def test_a_section_or_text_of_the_wrong_kind_is_refused(data: dict[str, Any]) -> None:
    assert next(iter(data)) in refused({"schema": 1, **data})


def test_a_missing_file_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no recipe file") as refusal:
        Recipe.load(tmp_path / "none.toml")
    assert str(tmp_path / "none.toml") in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.toml", b"schema = \n"),
        ("a.json", b"{"),
        ("a.json", b"[1]"),
        ("a.toml", b"\xff\xfe"),
        ("a.toml", b"schema = 1\n[cache]\nmethod = 'fbcach'\n"),
        ("a.json", b'{"schema": 1, "cache": {"threshold": NaN}}'),
    ],
)
def test_a_bad_file_is_named_in_the_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        Recipe.load(tmp_path / name)
    assert name in str(refusal.value)
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ValueError, match=r"folder\.toml cannot be read"):
        Recipe.load(tmp_path / "folder.toml")


def test_a_file_with_another_suffix_is_read_as_toml_or_told_what_is_expected(tmp_path: Path) -> None:
    good, bad = tmp_path / "mine.recipe", tmp_path / "mine.yaml"
    good.write_text('schema = 1\n[cache]\nmethod = "interval"\n')
    bad.write_text("schema: 1\ncache:\n  method: interval\n")
    assert Recipe.load(good).cache.method == "interval"
    with pytest.raises(ValueError, match=r"mine\.yaml cannot be read: a \.toml or \.json file is expected") as refusal:
        Recipe.load(bad)
    assert "YAML" not in str(refusal.value)


def test_a_file_beside_one_is_found_under_its_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("schema: 1\n")
    with pytest.raises(ValueError, match=r"a \.toml or \.json file is expected"):
        Recipe.load("mine.yaml")


def test_sigmas_fall_from_start_to_end() -> None:
    assert Cache(sigma_start=0.5, sigma_end=0.5).sigma_end == 0.5
    with pytest.raises(ValueError, match=r"sigma_start is 0\.2 and cache\.sigma_end is 0\.8: sigmas fall"):
        Cache(sigma_start=0.2, sigma_end=0.8)


def test_settings_that_nothing_looks_at_are_named() -> None:
    assert unused(Cache(), Attention(), steps=28) == []
    assert (
        unused(
            Cache(method="fbcache", threshold=0.2, signal="output", predictor="taylor", order=2), Attention(), steps=28
        )
        == []
    )
    assert unused(Cache(method="interval", threshold=0.2), Attention(), steps=28) == [
        "cache.threshold is not used by cache.method interval, only by fbcache or mbcache or teacache or easycache or "
        "magcache"
    ]
    assert unused(Cache(method="schedule", steps=(0, 2), reach=0.3), Attention(), steps=28) == [
        "cache.reach is not used by cache.predictor hold, only by damped"
    ]
    known_settings = {f.name for f in dataclasses.fields(Cache)}
    assert set(TAKEN_BY) | set(FORECAST_BY) <= known_settings


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_set_nothing_in_vain(name: str) -> None:
    assert unused(Recipe.load(name).cache, Attention(), steps=28) == []


def test_what_attention_or_a_short_run_leaves_unused_is_said() -> None:
    assert unused(Cache(), Attention(backend="sparse", keep=0.3), steps=28) == []
    assert unused(Cache(), Attention(backend="sdpa", keep=0.3), steps=28) == [
        "attention.keep is not used by attention.backend sdpa, only by sparse or sol"
    ]
    listed = Cache(method="schedule", steps=(0, 50, 70))
    assert unused(listed, Attention(), steps=71) == []
    assert unused(listed, Attention(), steps=12) == [
        "cache.steps names step 50, beyond this run's 12: cache.of says how long its run is"
    ]


def test_tokens_beside_a_method_without_them_are_refused_whatever_their_values() -> None:
    for tokens in ({"ratio": 0.1}, {"ratio": 0.3}):
        with pytest.raises(ValueError, match="set it to toca, duca or modules"):
            Recipe.from_dict({"schema": 1, "cache": {"method": "fbcache"}, "tokens": tokens})
    Recipe.from_dict({"schema": 1, "tokens": {}})


SANA = {"schema": 1, "cache": {"method": "schedule", "steps": [0, 2], "of": 4, "sana": {"steps": [0, 1, 3]}}}


def test_sana_has_cache_settings_of_its_own(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(SANA)
    assert recipe.cache.steps == (0, 2) and recipe.sana == dataclasses.replace(recipe.cache, steps=(0, 1, 3))
    assert recipe.to_dict() == SANA
    (tmp_path / "mine.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.load(tmp_path / "mine.toml") == recipe
    for family, steps in ((flux(2, 2), (0, 2)), (sana(4), (0, 1, 3))):
        fitted, said = fitted_to(recipe, family)
        assert (fitted.cache.steps, fitted.sana, said) == (steps, None, [])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"sana": 3}, r"\[cache.sana\] is 3"),
        ({"sana": {"stepz": [1]}}, r"\[cache.sana\] has no 'stepz'|did you mean 'steps'"),
        ({"sana": {"method": "schedule"}}, "cache.steps is empty"),
    ],
)
def test_what_is_wrong_in_sanas_own_settings_is_said(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Recipe.from_dict({"schema": 1, "cache": given})
