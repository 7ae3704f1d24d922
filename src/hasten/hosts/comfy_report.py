"""comfy_report.py shows a run's report in ComfyUI: a table as text, and its strip as a picture."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hasten.report import Report

# What each decision looks like in the strip: (red, green, blue), 0 to 1.
COLOURS = {"compute": (0.93, 0.42, 0.16), "reuse": (0.24, 0.62, 0.86), "partial": (0.95, 0.75, 0.25)}
BACKGROUND = 0.09
CELL, GAP, HEIGHT, COLUMNS = 24, 4, 120, 50


def as_text(report: Report) -> str:
    """The run's line, its strip, and a row for each evaluation."""
    if not report.evaluations:
        return " · ".join(report.notes) or "nothing was sampled"
    rows = [report.line(), report.strip, ""]
    rows.append(f"{'step':>4} {'sigma':>8} {'did':<8} {'change':>9} {'ms':>9}  why")
    for e in report.evaluations:
        change = "" if e.change is None else f"{e.change:.4f}"
        rows.append(f"{e.interval + 1:>4} {e.sigma:>8.4f} {e.decision:<8} {change:>9} {e.ms:>9.1f}  {e.reason}")
    return "\n".join(rows)


def as_picture(report: Report) -> Tensor:
    """The strip, one cell for each evaluation, as high as it took long, up to half more than the usual computed one.

    (1, H, W, 3), 0 to 1.
    """
    count = max(len(report.evaluations), 1)
    columns = min(count, COLUMNS)
    rows = math.ceil(count / columns)
    picture = torch.full((1, rows * (HEIGHT + GAP) + GAP, columns * (CELL + GAP) + GAP, 3), BACKGROUND)
    computed = sorted(e.ms for e in report.evaluations if e.decision == "compute") or [0.0]
    # Not the longest: a first step that also warms up would flatten all others.
    longest = 1.5 * computed[len(computed) // 2]
    for i, e in enumerate(report.evaluations):
        top, left = GAP + i // columns * (HEIGHT + GAP), GAP + i % columns * (CELL + GAP)
        height = HEIGHT if longest <= 0 else max(4, min(HEIGHT, round(HEIGHT * e.ms / longest)))
        cell = picture[0, top + HEIGHT - height : top + HEIGHT, left : left + CELL]
        cell[:] = torch.tensor(COLOURS[e.decision])
    return picture
