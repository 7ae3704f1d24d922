"""Draws results/flux_nano.png from results/flux_nano.csv; it knows columns, never methods' meaning.

Run alone (`python benchmarks/plot.py`) it redraws the picture from the file as it stands.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
RIVALS = {"euler": ("fewer Euler steps", "black"), "dpm++ 2m": ("fewer steps, DPM++ 2M", "0.5")}
# One colour for a predictor family, one marker for each way of deciding.
CURVES = {
    ("interval", "hold"): ("fixed interval, hold", "#9aa5b1", "-"),
    ("interval", "taylor1"): ("fixed interval, Taylor 1", "#6baed6", "-"),
    ("interval", "taylor2"): ("fixed interval, Taylor 2", "#2171b5", "-"),
    ("spectrum", "chebyshev"): ("Spectrum (growing, Chebyshev)", "#74c476", "-"),
    ("schedule", "taylor2"): ("shaped schedule, Taylor 2", "#08306b", "--"),
    ("schedule", "fitted"): ("shaped schedule, fitted weights", "#d94801", "--"),
    ("fbcache", "hold"): ("FBCache, hold", "#c994c7", "-"),
    ("fbcache", "taylor1"): ("FBCache, Taylor 1", "#ce1256", "-"),
    ("mbcache", "hold"): ("MBCache, hold", "#d9b38c", "-"),
    ("teacache", "hold"): ("TeaCache, hold", "#8c6d31", ":"),
    ("easycache", "hold"): ("EasyCache, hold", "#b5cf6b", ":"),
    ("magcache", "hold"): ("MagCache, hold", "#9e9ac8", ":"),
}
PEERS = {"diffusers": ("s", "diffusers' caches"), "cache-dit": ("^", "cache-dit")}


def main() -> None:
    """Reads the table and draws it."""
    draw(read(RESULTS / "flux_nano.csv"), RESULTS / "flux_nano.png")


def read(file: Path) -> list[dict[str, str]]:
    """The table's rows as they are written."""
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def draw(rows: list[dict[str, str]], file: Path) -> None:
    """Two panels, PSNR against evaluations and against wall clock, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in rows if row["method"] != "none"]
    if not rows:
        return
    figure, panels = plt.subplots(1, 2, figsize=(13.5, 6.2), sharey=True, gridspec_kw={"wspace": 0.04})
    steps = max(int(row["steps"]) for row in rows)
    for panel, across in zip(panels, (_evaluations, _time_share), strict=True):
        _draw_panel(panel, rows, across)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    where = f"{rows[0]['size']}, {steps} steps, {rows[0]['dtype']} ({rows[0]['device']})"
    panels[0].set_xlabel(f"evaluations computed (the uncached run: {steps})")
    panels[1].set_xlabel("wall clock as a share of the uncached run's, one picture at a time")
    panels[0].set_ylabel(f"PSNR against the uncached {steps}-step picture, dB (median)")
    panels[0].set_xlim(3.5, 0.8 * steps)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[1].set_xlim(0.1, 0.9)
    figure.suptitle(f"flux-nano, {where}: the same prompts and the same noise for all", y=0.95)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(0.905, 0.5), frameon=False, fontsize=9)
    partial = file.with_suffix(".part.png")
    figure.savefig(partial, dpi=110, bbox_inches="tight")
    plt.close(figure)
    partial.replace(file)


def _draw_panel(panel: object, rows: list[dict[str, str]], across: object) -> None:
    for (method, predictor), (label, colour, line) in CURVES.items():
        mine = [r for r in rows if r["method"] == method and r["predictor"] == predictor]
        _line(panel, mine, across, label=label, color=colour, linestyle=line, linewidth=1.4, marker="o", markersize=3.5)
    for library, (marker, label) in PEERS.items():
        mine = [r for r in rows if r["method"].startswith(library)]
        points = sorted((across(r), float(r["psnr_db"])) for r in mine if across(r) is not None)
        if points:
            xs, ys = zip(*points, strict=True)
            panel.scatter(xs, ys, marker=marker, s=34, facecolors="none", edgecolors="#444444", label=label, zorder=4)
    for predictor, (label, colour) in RIVALS.items():
        mine = [r for r in rows if r["method"] == "fewer steps" and r["predictor"] == predictor]
        _line(panel, mine, across, label=label, color=colour, linewidth=3.2, zorder=3)
    recipes = [row for row in rows if row["method"] == "recipe" and across(row) is not None]
    for i, row in enumerate(recipes):
        x, y = across(row), float(row["psnr_db"])
        label = None if i else "shipped recipes"
        panel.scatter([x], [y], marker="*", s=230, color="#e6550d", edgecolors="white", zorder=6, label=label)
        panel.annotate(row["knob"], (x, y), xytext=(8, 7), textcoords="offset points", fontsize=10, weight="bold")


def _line(panel: object, rows: Iterable[dict[str, str]], across: object, **style: object) -> None:
    points = sorted((across(r), float(r["psnr_db"])) for r in rows if across(r) is not None)
    if points:
        xs, ys = zip(*points, strict=True)
        panel.plot(xs, ys, **style)


def _evaluations(row: dict[str, str]) -> float | None:
    return float(row["evaluations"]) if row["psnr_db"] else None


def _time_share(row: dict[str, str]) -> float | None:
    return float(row["wall_s"]) / float(row["baseline_wall_s"]) if row["wall_s"] and row["psnr_db"] else None


if __name__ == "__main__":
    main()
