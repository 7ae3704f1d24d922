"""Bad input and interruption as one sentence on stderr and an exit code."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ParamSpec

import typer
from rich.console import Console

BAD_INPUT, INTERRUPTED = 2, 130
P = ParamSpec("P")


def in_one_sentence(command: Callable[P, None]) -> Callable[P, None]:
    """The command, with bad input and interruption turned into one sentence on stderr and an exit code."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            fail("interrupted; nothing was written.", INTERRUPTED)
        except (ValueError, OSError) as error:
            fail(str(error) or type(error).__name__, BAD_INPUT)
        except ImportError as error:
            from hasten.machine import first_line

            fail(f"a package is missing or does not fit ({first_line(error)}): see `hasten doctor`.", BAD_INPUT)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            fail("the device ran out of memory: try a smaller --size or --batch, or --dtype bfloat16.", BAD_INPUT)

    return guarded


def fail(sentence: str, code: int) -> None:
    """The sentence on stderr, in one line, and out."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"hasten: {' '.join(sentence.split())}", markup=False)
    raise typer.Exit(code)


def value_sentence(error: typer.BadParameter, words: Sequence[str]) -> str | None:
    """What is wrong with an option's value: what was given, what is allowed. None for what is no option's value.

    words: the command line. typer words its own sentences otherwise from version to version.
    """
    names = [name for name in getattr(error.param, "opts", ()) if name.startswith("-")]
    if not names or type(error) is not typer.BadParameter:
        return None
    found = [after for word, after in pairwise(words) if word in names]
    found += [word.partition("=")[2] for word in words if word.partition("=")[0] in names and "=" in word]
    given = f" is {found[-1]!r}" if found else ""
    return f"{names[0]}{given}: {_allowed(error)}."


def _allowed(error: typer.BadParameter) -> str:
    usual = getattr(error.param, "default", None)
    such_as = f" such as {usual}" if isinstance(usual, int | float) else ""
    for kind, wanted in (("integer", "give a whole number"), ("float", "give a number"), ("number", "give a number")):
        if kind in error.message:
            return wanted + such_as
    least = re.search(r"(?:greater than or equal to|x>=) ?(\d+)", error.message)
    if least:
        return f"give {least[1]} or more"
    return error.message[:1].lower() + error.message[1:].rstrip(".")
