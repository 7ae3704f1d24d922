"""What is shown of comparisons: several requests, each drawn in the same ways, their averages, and a demo of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

import hasten
from hasten.compare import Row
from hasten.machine import machine_words
from hasten.painter import Painter, Request


@dataclass(frozen=True)
class Showing:
    """One request drawn in several ways: what a page, a sheet or a table shows of it. Row 0 is the baseline."""

    request: Request
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; without the pictures."""
        keys = ("prompt", "size", "steps", "seed", "guidance")
        plain = {key: getattr(self.request, key) for key in keys}
        return plain | {"rows": [row.to_dict() for row in self.rows]}


# Times that no recipe explains. Pictures of half a second vary by a tenth on a machine with nothing else to do.
SLACK, APART = 1.3, 1.5
# Sections that make each evaluation cheaper, so that what was saved is no limit to the speed-up.
CHEAPER = ("skip", "attention", "compile", "quantize")


def doubt(showings: Sequence[Showing]) -> str:
    """Why the times are not to be trusted, in a sentence; empty when nothing speaks against them.

    A run cannot save more time than evaluations, and uncached pictures of one size take the same time.
    """
    sentence = "this machine was busy or still warming up, so the times are not to be trusted ({}): run it again."
    for showing in showings:
        for row in showing.rows[1:]:
            for shown in (row, row.fewer) if row.fewer is not None else (row,):
                most = showing.rows[0].computed / max(shown.computed, 1)
                if shown.speedup > SLACK * most and not any(shown.drawing.report.recipe.get(s) for s in CHEAPER):
                    return sentence.format(f"{shown.name} {shown.speedup:.1f}x where {most:.1f}x is the most")
    times = [showing.rows[0].drawing.wall_s for showing in showings]
    if max(times) > APART * min(times):
        return sentence.format(f"uncached pictures took {min(times):.1f} to {max(times):.1f} s")
    return ""


@dataclass(frozen=True)
class Average:
    """The same row of several showings, averaged. psnr_db is None when every picture was identical.

    left_out: how many showings were identical, and so are in no mean PSNR.
    """

    name: str
    steps: float
    computed: float
    wall_s: float
    speedup: float
    psnr_db: float | None
    ssim: float
    cache_mib: float
    left_out: int = 0
    fewer: Average | None = None

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Average:
        """The mean of the rows; identical pictures, being infinitely near, are left out of the mean PSNR."""
        distances = [row.likeness.psnr_db for row in rows if row.likeness.psnr_db is not None]
        fewer = [row.fewer for row in rows if row.fewer is not None]
        return cls(
            name=rows[0].name if rows[0].kind != "fewer" else "plain steps",
            steps=fmean(row.steps for row in rows),
            computed=fmean(row.computed for row in rows),
            wall_s=fmean(row.drawing.wall_s for row in rows),
            # Of the summed times: a mean of ratios lets one short hiccup of the machine weigh like a whole run.
            speedup=sum(row.speedup * row.drawing.wall_s for row in rows) / sum(row.drawing.wall_s for row in rows),
            psnr_db=fmean(distances) if distances else None,
            ssim=fmean(row.likeness.ssim for row in rows),
            cache_mib=fmean(row.drawing.report.cache_mib for row in rows),
            left_out=len(rows) - len(distances),
            fewer=cls.of(fewer) if fewer else None,
        )

    @property
    def psnr_words(self) -> str:
        """As people read it: "34.2 dB", "34.2 dB, 1 identical left out", or "identical"."""
        if self.psnr_db is None:
            return "identical"
        return f"{self.psnr_db:.1f} dB" + (f", {self.left_out} identical left out" if self.left_out else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "fewer"}
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in plain.items()}
        if self.psnr_db is None:
            rounded["identical"] = True
        return rounded | ({"fewer_steps": self.fewer.to_dict()} if self.fewer else {})


def averages(showings: Sequence[Showing]) -> list[Average]:
    """One average for each way of drawing; every showing has the same ways in the same order."""
    return [Average.of(rows) for rows in zip(*(showing.rows for showing in showings), strict=True)]


@dataclass(frozen=True)
class Demo:
    """Everything that the page and the sheet show. other: the same of another model."""

    painter: Painter
    showings: list[Showing]
    descriptions: dict[str, str]
    other: Demo | None = None

    @property
    def parts(self) -> list[Demo]:
        """This, and the other model's."""
        return [self] if self.other is None else [self, self.other]

    @property
    def averages(self) -> list[Average]:
        """One line for each way of drawing, averaged over the prompts."""
        return averages(self.showings)

    @property
    def circumstances(self) -> str:
        """The machine and the settings in one line: no figure means anything without them."""
        request = self.showings[0].request
        return " · ".join(
            [
                self.painter.model,
                machine_words(self.painter.device),
                self.painter.dtype,
                request.size,
                f"{request.steps} steps",
                f"guidance {request.guidance:g}",
                f"seed {request.seed}",
                f"hasten {hasten.__version__}",
            ]
        )

    @property
    def doubt(self) -> str:
        """Why this model's times are not to be trusted; empty when nothing speaks against them."""
        return doubt(self.showings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; without the pictures."""
        return {
            "schema": 1,
            "version": hasten.__version__,
            "model": self.painter.model,
            "device": self.painter.device,
            "dtype": self.painter.dtype,
            "doubt": self.doubt,
            "averages": [average.to_dict() for average in self.averages],
            "showings": [showing.to_dict() for showing in self.showings],
            **({"other": self.other.to_dict()} if self.other else {}),
        }
