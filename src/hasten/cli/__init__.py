"""The `hasten` command: parses words, prints findings. What it prints is computed elsewhere.

Results go to stdout; bars, remarks and errors to stderr. Exit codes: 0 done, 2 bad input (one sentence says what),
130 interrupted. Heavy packages are imported inside the commands, so that `hasten --help` is instant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hasten.cli.draw import compare, demo, generate
from hasten.cli.look import doctor, recipes
from hasten.cli.measure import calibrate, tune_attention
from hasten.cli.sentence import BAD_INPUT, fail, value_sentence


class Commands(TyperGroup):
    """The commands; an option's value that is no number is said as everything else is."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was asked for."""
        words = [*getattr(ctx, "_protected_args", ()), *ctx.args]
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            sentence = value_sentence(error, words)
            if sentence is None:
                raise
            fail(sentence, BAD_INPUT)


app = typer.Typer(
    name="hasten",
    cls=Commands,
    help="FLUX image generation, several times faster, with an honest account of what it cost.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and leaves with its exit code."""
    app(args=argv if argv is None else list(argv), prog_name="hasten")


@app.callback(invoke_without_command=True)
def front(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """FLUX image generation, several times faster, with an honest account of what it cost."""
    if version:
        import hasten

        print(hasten.__version__)
        raise typer.Exit


for command in (generate, compare, demo, calibrate, tune_attention, recipes, doctor):
    app.command(command.__name__.replace("_", "-"))(command)
