"""Where the command line says things: results on stdout, bars and remarks on stderr, only JSON with --json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from hasten.showing import Average


class Screen:
    """One command's voice. quiet: no bars, no remarks, no results; as_json: the caller prints the result."""

    def __init__(self, *, quiet: bool, as_json: bool) -> None:
        self.silent = quiet or as_json
        self.quiet = quiet
        self.results = Console(soft_wrap=True, highlight=False)
        self.asides = Console(stderr=True, highlight=False)

    def say(self, words: str) -> None:
        """A result, unless quiet."""
        if not self.silent:
            self.results.print(words, markup=False)

    def remark(self, words: str) -> None:
        """Something to know about a result, unless quiet."""
        if not self.quiet:
            self.asides.print(f"note: {words}", markup=False)

    @contextmanager
    def waiting(self, words: str) -> Iterator[None]:
        """A spinner while something without steps goes on."""
        if self.quiet:
            yield
            return
        if not self.asides.is_terminal:
            self.asides.print(f"{words} ...", markup=False)
        with self.asides.status(words):
            yield

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None] | None]:
        """A bar that is told what is drawn and how far it is, gone when all is done; a line a picture in a pipe."""
        if self.quiet:
            yield None
            return
        if not self.asides.is_terminal:
            yield lambda words, done, total: None if done else self.asides.print(f"drawing: {words}", markup=False)
            return
        columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.asides, transient=True) as bars:
            task = bars.add_task("warming up", total=None)

            def tell(words: str, done: int, total: int) -> None:
                bars.update(task, description=words, completed=done, total=total)

            yield tell

    def table(self, averages: Sequence[Average], circumstances: str, doubt: str = "") -> None:
        """The figures of a comparison, a line for each way of drawing, and what speaks against their times."""
        if self.silent:
            return
        # Nine columns have to stand in the 80 characters of a pipe: hence no frame and short words.
        table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
        for head in ("recipe", "computed", "time", "speed", "PSNR", "SSIM", "plain PSNR", "SSIM", "MiB"):
            table.add_column(head, justify="left" if head == "recipe" else "right", no_wrap=True)
        for line in averages:
            cost = (f"{line.computed:.3g} of {line.steps:.3g}", f"{line.wall_s:.2f} s", f"{line.speedup:.2f}x")
            if line.fewer is None:
                table.add_row(line.name, *cost, "", "", "", "", "")
                continue
            ours = (_db(line), f"{line.ssim:.3f}")
            rival = (_db(line.fewer), f"{line.fewer.ssim:.3f}")
            table.add_row(line.name, *cost, *ours, *rival, f"{line.cache_mib:.2f}")
        self.results.print(table)
        self.results.print(
            "PSNR in dB and SSIM against the uncached picture; plain: nothing reused, as many steps as were "
            f"computed; MiB: the cache.{_left_out(averages)}\n{circumstances}\n",
            markup=False,
        )
        if doubt:
            self.remark(doubt)


def _db(line: Average) -> str:
    """The mean PSNR in a narrow column; starred where identical pictures are not in it."""
    return "same" if line.psnr_db is None else f"{line.psnr_db:.1f}" + "*" * (line.left_out > 0)


def _left_out(averages: Sequence[Average]) -> str:
    lines = [line for average in averages for line in (average, average.fewer) if line and line.psnr_db is not None]
    most = max((line.left_out for line in lines), default=0)
    return f" *: without identical pictures, {most} at most." if most else ""
