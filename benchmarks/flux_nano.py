"""The figures of flux-nano: every method over its knob, beside fewer steps and other libraries, in one command.

    python benchmarks/flux_nano.py

rewrites results/flux_nano.csv and results/flux_nano.png. Pictures may be drawn on one machine and seconds taken on
another (`--part pictures` on a GPU, then `--part seconds` on a CPU): each rewrites its own columns, the other's stay;
--take FILE writes a part from the lines that the other machine left in .cache.
--resume continues an interrupted run, --only PATTERN measures some rows again and keeps the others, --quick is a small
run into .cache/quick that proves nothing. How each column is measured is written in NOTES.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import plot
import tables
import torch
from fitting import calibration
from grid import Row, all_rows
from measuring import CONVERGED_STEPS, Settings, Studio, measure_quality, measure_time
from peers import LIBRARIES, installed
from record import Plan, finished, recipe_table, write_table

import hasten

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"
TIMED_TOGETHER = 4  # rows that share one interleaved baseline
CALIBRATION_PROMPTS = 16


def main() -> None:
    """Measures, then writes the table and the plot."""
    given = arguments()
    settings = settings_of(given)
    folder = CACHE / "quick" if given.quick else HERE / "results"
    plan = Plan(
        settings, given.part != "seconds", given.part != "pictures", folder,
        CACHE / f"rows-{given.part}-{settings.key()}.jsonl",
    )  # fmt: skip
    CACHE.mkdir(parents=True, exist_ok=True)
    if given.peers:
        studio = Studio(settings)
        measure_rows(plan, studio, pending(plan, rows_of(given, given.peers)), references(plan, studio))
        return
    every = rows_of(given, None)
    if given.take:
        write(plan, every, finished(given.take), given)
        return
    if not given.resume:
        plan.partial.unlink(missing_ok=True)
    studio = Studio(settings)
    say_estimate(studio, plan, every)
    drawn = references(plan, studio)
    measure_rows(plan, studio, pending(plan, [row for row in every if not row.process]), drawn)
    del studio, drawn
    for library in LIBRARIES:
        if pending(plan, rows_of(given, library)):
            run_peers(given, library)
    write(plan, every, finished(plan.partial), given)


def write(plan: Plan, rows: Sequence[Row], done: Mapping[str, dict[str, Any]], given: argparse.Namespace) -> None:
    """The CSV, its plot, and the README's table."""
    file = plan.folder / "flux_nano.csv"
    write_table(plan, rows, done, keep_others=bool(given.only) or given.part != "both")
    measured = plot.read(file)
    plot.draw(measured, file.with_suffix(".png"))
    if not given.quick:
        tables.rewrite("flux_nano", *recipe_table(measured))
    print(f"wrote {file} and {file.with_suffix('.png')}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a diffusers folder of a FLUX; the shipped flux-nano when left out")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--timing-prompts", type=int, default=4)
    parser.add_argument("--size", default="128x128", help="width x height")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--batch", type=int, default=8, help="prompts in one call, and so in one decision")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", help="rounding in bfloat16 would hide what is to be compared")
    parser.add_argument("--part", choices=("both", "pictures", "seconds"), default="both")
    parser.add_argument("--take", type=Path, help="write the table from lines that another machine left in .cache")
    parser.add_argument("--no-converged", action="store_true", help="leave psnr_converged_db empty: it costs the most")
    parser.add_argument("--quick", action="store_true", help="4 prompts, 1 timed, 12 steps for what is converged")
    parser.add_argument("--only", help="rows whose method/knob/predictor contains this")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an interrupted run")
    parser.add_argument("--peers", choices=LIBRARIES, help=argparse.SUPPRESS)
    return parser.parse_args()


def settings_of(given: argparse.Namespace) -> Settings:
    """The run's settings."""
    device = given.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    width, height = map(int, given.size.split("x"))
    return Settings(
        model=given.model or str(hasten.models_folder() / "flux-nano"),
        prompts=min(given.prompts, 4) if given.quick else given.prompts,
        timing_prompts=1 if given.quick else given.timing_prompts,
        width=width,
        height=height,
        steps=given.steps,
        batch=given.batch,
        device=device,
        dtype=given.dtype,
        converged_steps=0 if given.no_converged else 12 if given.quick else CONVERGED_STEPS,
    )


def rows_of(given: argparse.Namespace, process: str | None) -> list[Row]:
    """The rows that were asked for, of one process or (None) of all; libraries that are not there leave theirs out."""
    absent = {library for library in LIBRARIES if not installed(library)}
    rows = [row for row in all_rows(given.steps) if row.process not in absent]
    rows = [row for row in rows if process is None or row.process == process]
    return [row for row in rows if not given.only or given.only in row.name]


def pending(plan: Plan, rows: Sequence[Row]) -> list[Row]:
    """Those that the partial file lacks."""
    done = finished(plan.partial)
    return [row for row in rows if row.name not in done]


def references(plan: Plan, studio: Studio) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The uncached pictures and the converged ones, each (N, 3, H, W), drawn once for these weights and settings."""
    if not plan.pictures:
        return None
    both: list[Any] = []
    for steps in (studio.settings.steps, studio.settings.converged_steps):
        if not steps:
            both.append(None)
            continue
        file = CACHE / f"pictures-{steps}-{studio.settings.key(steps)}.pt"
        if not file.is_file():
            begin = time.perf_counter()
            partial = file.with_suffix(".part")
            torch.save(studio.draw_all(steps=steps), partial)
            partial.replace(file)
            print(f"drew the {steps}-step pictures in {time.perf_counter() - begin:.0f} s", flush=True)
        both.append(torch.load(file, weights_only=True))
    return both[0], both[1]


def say_estimate(studio: Studio, plan: Plan, rows: Sequence[Row]) -> None:
    """Prints how long the pending rows will take, from two timed calls."""
    settings = studio.settings
    size = min(settings.batch, settings.prompts)
    studio.draw(0, size, steps=2)
    seconds = []
    for steps in (2, 6):
        begin = time.perf_counter()
        studio.draw(0, size, steps=steps)
        seconds.append(time.perf_counter() - begin)
    evaluation = max(seconds[1] - seconds[0], 1e-3) / 4 / size
    decode = max(seconds[0] / size - 2 * evaluation, 0.0)
    waiting = pending(plan, rows)
    pictures = settings.prompts * plan.pictures + settings.timing_prompts * plan.seconds
    total = sum((row.guess * evaluation + decode) * pictures for row in waiting)
    if plan.seconds:
        total += (settings.steps * evaluation + decode) * settings.timing_prompts * len(waiting) / TIMED_TOGETHER
    converging = settings.converged_steps * evaluation * settings.prompts * plan.pictures
    print(
        f"{len(waiting)} of {len(rows)} rows, {evaluation * 1000:.0f} ms an evaluation and {decode * 1000:.0f} ms a "
        f"decoding for each picture: about {total / 60:.0f} min, and {converging / 60:.0f} min more where the "
        "converged pictures are not there yet",
        flush=True,
    )


def measure_rows(
    plan: Plan, studio: Studio, rows: Sequence[Row], drawn: tuple[torch.Tensor, torch.Tensor | None] | None
) -> None:
    """Measures the rows, some at a time, and appends each group to the partial file as it is done."""
    if not rows:
        return
    settings = studio.settings
    measured = calibration(studio, CACHE, prompts=min(CALIBRATION_PROMPTS, settings.prompts))
    for first in range(0, len(rows), TIMED_TOGETHER):
        group = rows[first : first + TIMED_TOGETHER]
        methods = [row.make(measured) for row in group]
        records: list[dict[str, Any]] = [
            {"name": row.name, "steps": method.steps or settings.steps, "device": tables.device_name(settings.device)}
            for row, method in zip(group, methods, strict=True)
        ]
        if drawn is not None:
            for record, method in zip(records, methods, strict=True):
                record |= asdict(measure_quality(studio, method, *drawn))
        if plan.seconds:
            for record, timing in zip(
                records, measure_time(studio, methods, prompts=settings.timing_prompts), strict=True
            ):
                record |= asdict(timing)
        for record in records:
            with plan.partial.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")
            print(said(record), flush=True)
    if drawn is None:
        return
    # Nothing may be left behind by any method: the first picture must come out as it did.
    again = studio.draw(*studio.batches()[0])
    if not torch.equal(again, drawn[0][: len(again)]):
        print("warning: the uncached picture changed while methods were switched on and off", file=sys.stderr)


def said(record: dict[str, Any]) -> str:
    """A measured row for the terminal."""
    line = f"{record['name']:58}"
    if "psnr_db" in record:
        line += f" {record['evaluations']:5.1f} evaluations  {record['psnr_db']:6.2f} dB"
    if "wall_s" in record:
        line += f"  {record['wall_s']:.2f} of {record['baseline_wall_s']:.2f} s"
    return line


def run_peers(given: argparse.Namespace, library: str) -> None:
    """Measures one library's rows in a child process; what it patches goes with it."""
    print(f"-- {library}, in a process of its own", flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--peers", library]
    done = subprocess.run(command, check=False)
    if done.returncode:
        print(f"warning: the rows of {library} ended with code {done.returncode}; see above", file=sys.stderr)


if __name__ == "__main__":
    main()
