"""Draws the training scenes once, on all cores, into files that can be memory-mapped.

    python dataset.py --out DATA --start 0 --size 128x128 --count 40000

Beside the pixels go the cell labels (which thing covers each 8x8 pixels) and the seeds, from which the scenes and
captions are rebuilt: nothing else needs to be stored. Held-out combinations are never written.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scenes import Scene, draw, draw_scene, is_held_out, is_taught

CHUNK = 64


@dataclass(frozen=True)
class DrawnSet:
    """Drawn scenes of one size. pixels (N, H, W, 3) uint8, cells (N, H/8, W/8) uint8, seeds (N,) int64."""

    pixels: np.ndarray
    cells: np.ndarray
    seeds: np.ndarray

    def scene(self, index: int) -> Scene:
        """The scene of a row, rebuilt from its seed."""
        return draw_scene(int(self.seeds[index]))


def folder_of(data: Path, width: int, height: int, start: int) -> Path:
    return data / f"{width}x{height}-{start}"


def _paint_chunk(task: tuple[Path, int, int, int, bool, list[int]]) -> int:
    folder, row, width, height, jitter, seeds = task
    pixels = np.load(folder / "pixels.npy", mmap_mode="r+")
    cells = np.load(folder / "cells.npy", mmap_mode="r+")
    for offset, seed in enumerate(seeds):
        drawing = draw(draw_scene(seed), width, height, jitter=jitter)
        pixels[row + offset] = np.asarray(drawing.image)
        cells[row + offset] = drawing.cells
    return len(seeds)


def draw_set(
    data: Path,
    width: int,
    height: int,
    *,
    start: int,
    count: int,
    workers: int,
    taught: bool = False,
    jitter: bool = False,
) -> DrawnSet:
    """Draws `count` training scenes from seed `start` on into `data`, or opens them where that is done.

    taught: only what flux-nano is taught, instead of the whole drawable world; jitter: see `draw`.
    """
    folder = folder_of(data, width, height, start)
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        drawn = (draw_scene(seed) for seed in itertools.count(start))
        usable = (scene.seed for scene in drawn if not is_held_out(scene) and (is_taught(scene) or not taught))
        seeds = np.array(list(itertools.islice(usable, count)))
        np.save(folder / "seeds.npy", seeds)
        np.lib.format.open_memmap(folder / "pixels.npy", "w+", np.uint8, (count, height, width, 3)).flush()
        np.lib.format.open_memmap(folder / "cells.npy", "w+", np.uint8, (count, height // 8, width // 8)).flush()
        tasks = [
            (folder, row, width, height, jitter, seeds[row : row + CHUNK].tolist()) for row in range(0, count, CHUNK)
        ]
        with multiprocessing.Pool(workers) as pool:
            for done in itertools.accumulate(pool.imap_unordered(_paint_chunk, tasks)):
                print(f"\r{folder.name}: {done}/{count}", end="", flush=True)
        print()
        (folder / "done").touch()
    return open_set(folder)


def open_set(folder: Path) -> DrawnSet:
    """The drawn set in this folder, memory-mapped."""
    pixels, cells = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("pixels", "cells"))
    return DrawnSet(pixels, cells, np.load(folder / "seeds.npy"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", required=True, help="WIDTHxHEIGHT")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--taught", action="store_true", help="only what flux-nano is taught")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    width, height = (int(side) for side in args.size.split("x"))
    draw_set(args.out, width, height, start=args.start, count=args.count, workers=args.workers, taught=args.taught)


if __name__ == "__main__":
    main()
