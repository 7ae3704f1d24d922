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
        with self.asides.status(words):
            yield

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None] | None]:
        """A bar that is told what is drawn and how far it is; it is gone when all is done."""
        if self.quiet:
            yield None
            return
        columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.asides, transient=True) as bars:
            task = bars.add_task("warming up", total=None)

            def tell(words: str, done: int, total: int) -> None:
                bars.update(task, description=words, completed=done, total=total)

            yield tell

    def table(self, averages: Sequence[Average], circumstances: str) -> None:
        """The figures of a comparison, a line for each way of drawing."""
        if self.silent:
            return
        table = Table(caption=circumstances, caption_justify="left", header_style="bold")
        table.add_column("recipe", no_wrap=True)
        heads = ("computed", "time", "speed-up", "PSNR", "SSIM", "plain steps: PSNR", "SSIM", "cache MiB")
        for head in heads:
            table.add_column(head, justify="right")
        for line in averages:
            computed = f"{line.computed:.3g} of {line.steps:.3g}"
            if line.fewer is None:
                table.add_row(line.name, computed, f"{line.wall_s:.2f} s", "1.00x", "", "", "", "", "")
                continue
            rival = (line.fewer.psnr_words, f"{line.fewer.ssim:.3f}")
            ours = (line.psnr_words, f"{line.ssim:.3f}")
            cost = (computed, f"{line.wall_s:.2f} s", f"{line.speedup:.2f}x")
            table.add_row(line.name, *cost, *ours, *rival, f"{line.cache_mib:.2f}")
        self.results.print(table)
