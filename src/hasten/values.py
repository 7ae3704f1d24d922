"""values.py checks single values of a recipe, whoever wrote them: each error is one sentence that says what is allowed.

It knows names, types and ranges; what they are for is said by the sections that use it.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def typed(name: str, value: object, wanted: str) -> Any:
    """The value as the annotation wants it; a bool is never taken for a number."""
    if wanted.startswith("tuple"):
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise ValueError(f"{name} is {value!r}: a list in square brackets is expected.")
        inner = wanted[len("tuple[") : wanted.rindex(", ...")]
        return tuple(typed(name, item, inner) for item in value)
    if value is None and "None" in wanted:
        return None
    if wanted.startswith("bool"):
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}: true or false is expected.")
        return value
    if wanted.startswith("str"):
        if not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}: a text in quotes is expected.")
        return value
    whole = wanted.startswith("int")
    expected = ValueError(f"{name} is {value!r}: a {'whole ' if whole else ''}number is expected.")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise expected
    if not abs(value) <= sys.float_info.max:  # NaN, infinity, and whole numbers that no float holds
        raise ValueError(f"{name} is {value!r}: a finite number is expected.")
    if whole and value != int(value):
        raise expected
    return int(value) if whole else float(value)


def known(where: str, data: Mapping[str, Any], names: list[str]) -> None:
    """Returns when every key of `data` is one of `names`; the nearest one is offered. Raises ValueError."""
    for key in data:
        if key not in names:
            raise ValueError(f"{where} has an unknown key {key!r}: {nearest(key, names)}.")


def nearest(given: str, names: Sequence[str]) -> str:
    """The name that was probably meant, and all that there are."""
    close = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    listed = ", ".join(names)
    return f"did you mean {close[0]!r}? Known are {listed}" if close else f"known are {listed}"


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """Returns when the value is one of the allowed. Raises ValueError."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: {nearest(str(value), allowed)}.")


def between(name: str, value: float, low: float, high: float) -> None:
    """Returns when low <= value <= high. Raises ValueError."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}: a number from {low} to {high} is allowed.")


def at_least(name: str, value: int, low: int, meaning: str) -> None:
    """Returns when the value is at least `low`; `meaning` says what that one does. Raises ValueError."""
    if value < low:
        raise ValueError(f"{name} is {value}: at least {low} is allowed ({meaning}).")
