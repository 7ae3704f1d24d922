"""recipe.py says WHAT is wanted: frozen settings that travel as TOML, JSON or a dict.

It knows names, ranges and defaults. It knows no tensor, no model and no host; what a recipe means for
a given model is worked out in plan.py, when to compute in policy.py, what stands in in predict.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hasten.data import recipe_folder
from hasten.sections import Compile, Quantize
from hasten.values import at_least, between, known, nearest, one_of, typed

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10 only
    import tomli as tomllib

SCHEMA = 1
SUFFIXES = (".toml", ".json")

METHODS = (
    "none",
    "fbcache",
    "mbcache",
    "teacache",
    "easycache",
    "magcache",
    "interval",
    "schedule",
    "toca",
    "duca",
    "modules",
)
# Those that remember what each module of a block gave out, and refresh or forecast it between full evaluations.
INSIDE_BLOCKS = ("toca", "duca", "modules")
PREDICTORS = ("hold", "taylor", "chebyshev", "damped", "weights")

# Highest power first, as numpy.polyval takes them. Source: TeaCache4FLUX (ali-vilab/TeaCache, 2024).
TEACACHE_FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)

# attention.py's back-ends, "auto" for the fastest that is near enough, "unchanged" for the host's own.
ATTENTIONS = (
    *("unchanged", "auto", "sdpa", "cudnn", "flash2", "flash3", "flex", "sage", "kitchen", "int8", "int8_fp8"),
    *("sparge", "sol", "sparse"),
)

# Where a threshold is left out. fbcache: ParaAttention's middle setting for FLUX; mbcache: the original
# ComfyUI-Lightning node; teacache: its authors' 1.8x setting; easycache: ComfyUI's node; magcache: its authors.
DEFAULT_THRESHOLDS = {
    "fbcache": 0.12,
    "mbcache": 0.25,
    "teacache": 0.4,
    "easycache": 0.2,
    "magcache": 0.06,
}

# Mildest first: the order in which they are listed and shown.
SHIPPED = ("lossless", "balanced", "fast", "turbo")


@dataclass(frozen=True)
class Cache:
    """Settings of the step cache: one row of the table signal, policy, predictor, span.

    Fractions (`start`, `end`) are of the run's intervals, `steps` and `every` are counted in intervals,
    sigmas are the run's own. `compare_with` says which earlier evaluation a signal is held against:
    the last "computed" one, or the "latest" one whether computed or not; `distance` how: the relative "l1" distance
    (`relative_to` names its denominator), or half of one minus the "cosine", which knows no size.
    """

    method: str = "none"
    signal: str = "residual"
    distance: str = "l1"
    relative_to: str = "previous"
    compare_with: str = "auto"
    threshold: float | None = None
    thresholds: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    of: int = 0
    every: int = 4
    growth: float = 0.0
    coefficients: tuple[float, ...] = TEACACHE_FLUX
    ratios: tuple[float, ...] = ()
    start: float = 0.0
    end: float = 1.0
    sigma_start: float | None = None
    sigma_end: float | None = None
    max_consecutive_hits: int = -1
    first: bool = True
    last: bool = True
    predictor: str = "hold"
    order: int = 1
    degree: int = 4
    ridge: float = 0.1
    blend: float = 0.5
    window: int = 10
    reach: float = 0.15
    weights: tuple[tuple[float, ...], ...] = ()
    device: str = "auto"
    dtype: str = "model"

    def threshold_or_default(self) -> float:
        """The threshold, or the method's published one where none is given."""
        return DEFAULT_THRESHOLDS[self.method] if self.threshold is None else self.threshold

    def compares_with_latest(self) -> bool:
        """Whether a signal is compared with the latest evaluation, reused ones included.

        "auto" keeps each published rule: First-Block cache on residuals compares with the last computed
        evaluation (diffusers, ParaAttention); on outputs, as the original ComfyUI-Lightning nodes do, and
        where changes are added up (TeaCache, EasyCache), with the latest.
        """
        if self.compare_with != "auto":
            return self.compare_with == "latest"
        return self.method in ("teacache", "easycache") or self.signal == "output"

    def __post_init__(self) -> None:
        one_of("cache.method", self.method, METHODS)
        one_of("cache.signal", self.signal, ("residual", "output"))
        one_of("cache.distance", self.distance, ("l1", "cosine"))
        one_of("cache.relative_to", self.relative_to, ("previous", "current"))
        one_of("cache.compare_with", self.compare_with, ("auto", "computed", "latest"))
        one_of("cache.predictor", self.predictor, PREDICTORS)
        one_of("cache.device", self.device, ("auto", "cpu"))
        one_of("cache.dtype", self.dtype, ("model", "float32"))
        if self.threshold is not None:
            between("cache.threshold", self.threshold, 0.0, 10.0)
        for value in self.thresholds:
            between("cache.thresholds", value, 0.0, 10.0)
        between("cache.start", self.start, 0.0, 1.0)
        between("cache.end", self.end, 0.0, 1.0)
        if self.start > self.end:
            raise ValueError(
                f"cache.start is {self.start} and cache.end is {self.end}: start must not be after end; swap them."
            )
        if self.sigma_start is not None and self.sigma_end is not None and self.sigma_start < self.sigma_end:
            raise ValueError(
                f"cache.sigma_start is {self.sigma_start} and cache.sigma_end is {self.sigma_end}: sigmas fall, so the "
                "start must not be below the end; swap them."
            )
        at_least("cache.max_consecutive_hits", self.max_consecutive_hits, -1, "-1 means unlimited")
        at_least("cache.every", self.every, 1, "1 computes every evaluation")
        between("cache.growth", self.growth, 0.0, 100.0)
        between("cache.order", self.order, 0, 2)
        between("cache.degree", self.degree, 1, 8)
        between("cache.ridge", self.ridge, 0.0, 1000.0)
        between("cache.blend", self.blend, 0.0, 1.0)
        between("cache.window", self.window, 2, 16)
        between("cache.reach", self.reach, 0.001, 10.0)
        at_least("cache.of", self.of, 0, "0 takes the steps as they are")
        for step in self.steps:
            at_least("cache.steps", step, 0, "steps count from 0")
        if self.of and self.steps and max(self.steps) >= self.of:
            raise ValueError(
                f"cache.steps names step {max(self.steps)} of a run of cache.of = {self.of} steps: "
                f"the largest allowed is {self.of - 1}."
            )
        if self.method == "schedule" and not self.steps:
            raise ValueError(
                "cache.method is schedule but cache.steps is empty: list the steps to compute, such as [0, 1, 4, 8]."
            )
        if self.method == "magcache" and not self.ratios:
            raise ValueError(
                "cache.method is magcache but cache.ratios is empty: measure them with `hasten calibrate`, "
                "or copy a published list for your model."
            )
        if self.method == "teacache" and not self.coefficients:
            raise ValueError("cache.coefficients is empty: leave it out to use FLUX's, highest power first.")
        if self.predictor == "weights" and not self.weights:
            raise ValueError("cache.predictor is weights but cache.weights is empty: give one row for each reuse.")
        if self.weights and self.predictor != "weights":
            raise ValueError(
                f'cache.weights is given but cache.predictor is {self.predictor}: set predictor = "weights".'
            )
        if self.predictor == "weights" and self.method != "schedule":
            raise ValueError(
                f"cache.predictor is weights with cache.method {self.method}: fitted weights belong to a fixed "
                'list of steps; set method = "schedule".'
            )
        if any(not row or len(row) > 16 for row in self.weights):
            raise ValueError("each row of cache.weights takes 1 to 16 numbers, one for each remembered delta.")


@dataclass(frozen=True)
class Tokens:
    """Which tokens toca and duca refresh between full evaluations, and how what they reuse is kept.

    ratio: the share of tokens, before the layer's and the stage's term. depth: the layer term falls from 1.5 to 0.5
    over the "model"'s own blocks of a stage, or over 27 as in the "original". score: "attention" received, "value"
    norm, "random", or "age" alone. queries: so many of them, evenly spread, tell the attention received; 0 takes all.
    staleness: what a token gains that was left out for a whole period. spatial: what the best token of each cell of
    `cell` x `cell` gains, a share of its own score. full_first: steps at the beginning that are computed in full.
    memory: what is kept is in the "model"'s dtype, in "bf16", in "fp8", or in the model's dtype on the "host".
    record: on a GPU a partial evaluation's launches are recorded once a run and played from then on, where the model's
    weights stay in place.
    The defaults are those of FLUX in ToCa's code (arXiv 2410.05317), which the original ComfyUI-Lightning took over;
    but for `depth` and `queries`, there 27 and 0.
    """

    ratio: float = 0.1
    depth: str = "model"
    double: float = 0.4
    single: float = 1.6
    score: str = "attention"
    queries: int = 256
    staleness: float = 0.25
    spatial: float = 0.0
    cell: int = 4
    seed: int = 0
    full_first: int = 3
    memory: str = "model"
    record: bool = True

    def __post_init__(self) -> None:
        between("tokens.ratio", self.ratio, 0.0, 1.0)
        one_of("tokens.depth", self.depth, ("model", "original"))
        between("tokens.double", self.double, 0.0, 100.0)
        between("tokens.single", self.single, 0.0, 100.0)
        one_of("tokens.score", self.score, ("attention", "value", "random", "age"))
        at_least("tokens.queries", self.queries, 0, "0 takes all of them")
        between("tokens.staleness", self.staleness, 0.0, 100.0)
        between("tokens.spatial", self.spatial, 0.0, 100.0)
        at_least("tokens.cell", self.cell, 1, "1 gives every token the same")
        at_least("tokens.seed", self.seed, 0, "it seeds the random score")
        at_least("tokens.full_first", self.full_first, 0, "0 leaves it to the first evaluation")
        one_of("tokens.memory", self.memory, ("model", "bf16", "fp8", "host"))


@dataclass(frozen=True)
class Skip:
    """Blocks that are never run: their input passes on unchanged. Indices count from 0."""

    double: tuple[int, ...] = ()
    single: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("double", "single"):
            for index in getattr(self, name):
                at_least(f"skip.{name}", index, 0, "blocks count from 0")


@dataclass(frozen=True)
class Attention:
    """Which attention the model's blocks use; the host's own in the steps and blocks that stay exact.

    error: the largest relative L1 error that "auto" may choose. keep: the share of blocks of keys that "sparse" and
    "sol" keep. tuned: a file of `hasten tune-attention` with "sparse"'s settings for each head, instead of keep.
    exact_first, exact_last: of the run's intervals; exact_blocks: counted from 0 over all blocks.
    """

    backend: str = "unchanged"
    error: float = 0.06
    keep: float = 0.5
    tuned: str = ""
    exact_first: int = 0
    exact_last: int = 0
    exact_blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        one_of("attention.backend", self.backend, ATTENTIONS)
        between("attention.error", self.error, 0.0, 1.0)
        between("attention.keep", self.keep, 0.01, 1.0)
        if self.tuned and self.backend != "sparse":
            raise ValueError(f'attention.tuned is given but attention.backend is {self.backend}: set it to "sparse".')
        at_least("attention.exact_first", self.exact_first, 0, "0 keeps no step exact")
        at_least("attention.exact_last", self.exact_last, 0, "0 keeps no step exact")
        for block in self.exact_blocks:
            at_least("attention.exact_blocks", block, 0, "blocks count from 0")


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
