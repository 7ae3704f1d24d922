"""recipe.py says WHAT is wanted: frozen settings that travel as TOML, JSON or a dict.

Settings and their ranges are its sections' own (cache_section.py, sections.py). It knows no tensor, no model and no
host; what a recipe means for a given model is worked out in plan.py, when to compute in policy.py, what stands in in
predict.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hasten.cache_section import DEFAULT_THRESHOLDS, INSIDE_BLOCKS, METHODS, PREDICTORS, TEACACHE_FLUX, Cache
from hasten.data import recipe_folder
from hasten.sections import ATTENTIONS, Attention, Compile, Quantize, Skip, Tokens
from hasten.values import known, nearest, typed

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10 only
    import tomli as tomllib

__all__ = [
    "ATTENTIONS",
    "DEFAULT_THRESHOLDS",
    "INSIDE_BLOCKS",
    "METHODS",
    "PREDICTORS",
    "TEACACHE_FLUX",
    "Attention",
    "Cache",
    "Compile",
    "Quantize",
    "Recipe",
    "Skip",
    "Tokens",
    "recipe_names",
]

SCHEMA = 1
SUFFIXES = (".toml", ".json")

# Mildest first: the order in which they are listed and shown.
SHIPPED = ("lossless", "balanced", "fast", "turbo")


@dataclass(frozen=True)
class Recipe:
    """Everything that is wanted of one model's runs; immutable, comparable, deep-copied for free.

    sana: what stands in the place of `cache` on Sana, for its velocity changes at other times than FLUX's. Written as
    [cache.sana], which names only what differs.
    """

    cache: Cache = field(default_factory=Cache)
    sana: Cache | None = None
    tokens: Tokens = field(default_factory=Tokens)
    skip: Skip = field(default_factory=Skip)
    attention: Attention = field(default_factory=Attention)
    compile: Compile = field(default_factory=Compile)
    quantize: Quantize = field(default_factory=Quantize)
    description: str = ""
    name: str | None = field(default=None, compare=False)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.tokens != Tokens() and self.cache.method not in INSIDE_BLOCKS:
            raise ValueError(_idle_tokens(self.cache.method))

    @property
    def changes_model(self) -> bool:
        """Whether it asks for anything to be done to the model itself: compiled, quantised, fused."""
        asked = self.compile.blocks or self.compile.decoder or self.compile.text or self.compile.fuse == "always"
        return asked or self.quantize.format != "none"

    @classmethod
    def load(cls, source: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
        """The recipe that `source` names: a Recipe, a shipped name, a TOML or JSON file, a dict, or "none".

        Raises ValueError with one sentence on an unknown name, an unknown key (the nearest one is offered)
        or a value out of range, and FileNotFoundError for a file that is not there.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return cls.from_dict(source)
        text = str(source)
        if text == "none":
            return cls(name="none", description="Nothing is reused and nothing is skipped.")
        path = Path(text)
        if path.suffix.lower() in SUFFIXES or len(path.parts) > 1:
            return _from_file(path)
        shipped = recipe_folder() / f"{text}.toml"
        if shipped.is_file():
            return dataclasses.replace(_from_file(shipped), name=text)
        if path.is_file():
            return _from_file(path)
        raise ValueError(
            f"there is no recipe named {text!r}: {nearest(text, ['none', *recipe_names()])}, "
            "or give the path of a .toml or .json file."
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """A recipe from nested dicts as TOML and JSON give them; `schema` is the only key that must be there."""
        if "schema" not in data:
            raise ValueError(f"the recipe has no schema: add the line `schema = {SCHEMA}`.")
        if data["schema"] != SCHEMA or isinstance(data["schema"], bool):
            raise ValueError(f"the recipe's schema is {data['schema']!r}: this version reads schema {SCHEMA}.")
        known("the recipe", data, [f.name for f in fields(cls) if f.name != "sana"])
        for key in ("description", "name"):
            if not isinstance(data.get(key, ""), str):
                raise ValueError(f"{key} is {data[key]!r}: a text in quotes is expected.")
        cache, sana = _caches(data.get("cache", {}))
        if data.get("tokens") and cache.method not in INSIDE_BLOCKS:
            raise ValueError(_idle_tokens(cache.method))  # also where its values are the defaults
        return cls(
            cache=cache,
            sana=sana,
            tokens=_section("tokens", data.get("tokens", {}), Tokens),
            skip=_section("skip", data.get("skip", {}), Skip),
            attention=_section("attention", data.get("attention", {}), Attention),
            compile=_section("compile", data.get("compile", {}), Compile),
            quantize=_section("quantize", data.get("quantize", {}), Quantize),
            description=data.get("description", ""),
            name=data.get("name"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts with `schema` and every key that differs from its default; from_dict gives the recipe back."""
        out: dict[str, Any] = {"schema": self.schema}
        if self.name:
            out["name"] = self.name
        if self.description:
            out["description"] = self.description
        for section in ("cache", "tokens", "skip", "attention", "compile", "quantize"):
            changed = _changed(getattr(self, section))
            if section == "cache" and self.sana is not None:
                changed["sana"] = _changed(self.sana, self.cache)
            if changed:
                out[section] = changed
        return out

    def to_toml(self) -> str:
        """The recipe as a TOML file's text; Recipe.load reads the same recipe from it."""
        top = {k: v for k, v in self.to_dict().items() if not isinstance(v, dict)}
        lines = [f"{key} = {_toml(value)}" for key, value in top.items()]
        for section, values in self.to_dict().items():
            if isinstance(values, dict):
                lines += ["", f"[{section}]"]
                lines += [f"{key} = {_toml(value)}" for key, value in values.items() if not isinstance(value, dict)]
                for key, inner in values.items():
                    if isinstance(inner, dict):
                        lines += ["", f"[{section}.{key}]", *(f"{k} = {_toml(v)}" for k, v in inner.items())]
        return "\n".join(lines) + "\n"


def _idle_tokens(method: str) -> str:
    return f"[tokens] is given but cache.method is {method}: set it to toca, duca or modules, or leave [tokens] out."


def recipe_names() -> list[str]:
    """The names of the shipped recipes, mildest first."""
    found = {path.stem for path in recipe_folder().glob("*.toml")}
    return [name for name in SHIPPED if name in found] + sorted(found - set(SHIPPED))


def _from_file(path: Path) -> Recipe:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no recipe file {path}: check the path, or see `hasten recipes`.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the recipe file {path} cannot be read: {error}.") from None
    try:
        data = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"the recipe file {path} cannot be read: a .toml or .json file is expected.") from None
        raise ValueError(f"the recipe file {path} is not valid {path.suffix.lstrip('.').upper()}: {error}.") from None
    if not isinstance(data, dict):
        raise ValueError(f"the recipe file {path} holds a {type(data).__name__}: a table of keys is expected.")
    try:
        recipe = Recipe.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return recipe if recipe.name else dataclasses.replace(recipe, name=path.stem)


def _caches(data: object) -> tuple[Cache, Cache | None]:
    """[cache], and what [cache.sana] makes of it, or None."""
    if not isinstance(data, Mapping) or "sana" not in data:
        return _section("cache", data, Cache), None
    common = {key: value for key, value in data.items() if key != "sana"}
    own = data["sana"]
    if not isinstance(own, Mapping):
        raise ValueError(f"[cache.sana] is {own!r}: a table of keys is expected.")
    return _section("cache", common, Cache), _section("cache.sana", {**common, **own}, Cache)


def _section(name: str, data: object, kind: type[Any]) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"[{name}] is {data!r}: a table of keys is expected.")
    known(f"[{name}]", data, [f.name for f in fields(kind)])
    defaults = {f.name: f for f in fields(kind)}
    return kind(**{key: typed(f"{name}.{key}", value, str(defaults[key].type)) for key, value in data.items()})


def _toml(value: object) -> str:
    """JSON's numbers, strings, booleans and lists are TOML's too, but for surrogate pairs and a bare DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _changed(section: Any, against: Any = None) -> dict[str, Any]:
    """What differs from the defaults, or from another section."""
    plain: dict[str, Any] = {}
    for f in fields(section):
        value = getattr(section, f.name)
        if value != (f.default if against is None else getattr(against, f.name)):
            plain[f.name] = _listed(value)
    return plain


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value
