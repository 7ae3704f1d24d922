"""What flux_nano.py has measured: the lines of an unfinished run, the CSV, and the table of recipes in the README."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plot
from grid import Row, all_rows
from measuring import Settings
from tables import rounded

COLUMNS = [
    "host", "device", "dtype", "size", "steps", "batch", "method", "knob", "predictor", "evaluations", "wall_s",
    "baseline_wall_s", "psnr_db", "ssim", "psnr_converged_db", "checked", "cache_mib",
]  # fmt: skip
PICTURES = ("evaluations", "psnr_db", "ssim", "psnr_converged_db", "checked")  # what the two parts rewrite
SECONDS = ("wall_s", "baseline_wall_s", "cache_mib")


@dataclass(frozen=True)
class Plan:
    """Where a run writes, what it measures and what it takes up again."""

    settings: Settings
    pictures: bool
    seconds: bool
    folder: Path
    partial: Path


def finished(partial: Path) -> dict[str, dict[str, Any]]:
    """What the partial file holds, by the row's name; a line that was cut short is left out."""
    done: dict[str, dict[str, Any]] = {}
    if partial.is_file():
        for line in partial.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            done[record.pop("name")] = record
    return done


def write_table(plan: Plan, rows: Sequence[Row], done: Mapping[str, dict[str, Any]], *, keep_others: bool) -> None:
    """Rewrites the CSV with what is done: beside it first, then in its place."""
    file = plan.folder / "flux_nano.csv"
    before = {f"{r['method']}/{r['knob']}/{r['predictor']}": r for r in plot.read(file)} if file.is_file() else {}
    table = {row.name: line_of(plan, row, done[row.name], before.get(row.name, {})) for row in rows if row.name in done}
    if keep_others:  # but those of rows that there are no more
        still = {row.name for row in all_rows(plan.settings.steps)}
        table = {name: line for name, line in {**before, **table}.items() if name in still}
    plan.folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    with partial.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())
    partial.replace(file)


def line_of(plan: Plan, row: Row, record: dict[str, Any], before: dict[str, str]) -> dict[str, Any]:
    """One line of the CSV, rounded to what can be told apart; columns of the other part stay as they were."""
    settings = plan.settings
    digits = {
        "evaluations": 2, "wall_s": 4, "baseline_wall_s": 4, "psnr_db": 2, "ssim": 4, "psnr_converged_db": 2,
        "checked": 3, "cache_mib": 3,
    }  # fmt: skip
    mine = (PICTURES if plan.pictures else ()) + (SECONDS if plan.seconds else ())
    measured = {key: rounded(record[key], digits[key]) if key in mine else before.get(key, "") for key in digits}
    return {
        "host": "diffusers",
        "device": device_names(plan, record["device"], before.get("device", "")),
        "dtype": settings.dtype,
        "size": f"{settings.width}x{settings.height}",
        "steps": record["steps"],
        "batch": settings.batch,
        "method": row.method,
        "knob": row.knob,
        "predictor": row.predictor,
        **measured,
    }


def device_names(plan: Plan, name: str, before: str) -> str:
    """The device's name; of a table in two parts, "pictures: NAME; seconds: NAME"."""
    if plan.pictures and plan.seconds:
        return name
    parts = dict(part.split(": ", 1) for part in before.split("; ") if ": " in part)
    parts["pictures" if plan.pictures else "seconds"] = name
    return "; ".join(f"{part}: {parts[part]}" for part in ("pictures", "seconds") if part in parts)


def recipe_table(rows: Sequence[dict[str, str]]) -> tuple[list[str], list[list[str]]]:
    """The README's table: each shipped recipe beside as many Euler steps, read off between two counts where need be."""
    euler = {
        float(row["evaluations"]): float(row["psnr_db"])
        for row in rows
        if row["method"] in ("fewer steps", "none") and row["predictor"] in ("euler", "")
    }
    header = ["recipe", "evaluations", "PSNR", "as many plain steps", "time", "cache", "accepted by the checker"]
    lines = []
    for row in rows:
        if row["method"] == "recipe" and row["psnr_db"]:
            share = float(row["wall_s"]) / float(row["baseline_wall_s"]) if row["wall_s"] else None
            lines.append([
                f"`{row['knob']}`", row["evaluations"], f"{float(row['psnr_db']):.1f} dB",
                f"{between(euler, float(row['evaluations'])):.1f} dB",
                "" if share is None else f"{share:.2f} of the uncached", f"{row['cache_mib']} MiB",
                f"{float(row['checked']):.0%}" if row["checked"] else "",
            ])  # fmt: skip
    return header, lines


def between(curve: dict[float, float], x: float) -> float:
    """The curve's value at x, on the line between its neighbours."""
    low, high = max(k for k in curve if k <= x), min(k for k in curve if k >= x)
    return curve[low] if low == high else curve[low] + (curve[high] - curve[low]) * (x - low) / (high - low)
