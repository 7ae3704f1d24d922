"""What every benchmark's table needs: the device's name, rounding, and a place in the README.

A table stands in a Markdown file between two marks, so that no figure there is typed by hand:

    <!-- table: flux_nano -->
    ...
    <!-- end of table -->
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

README = Path(__file__).resolve().parents[1] / "README.md"
END = "<!-- end of table -->"


def rewrite(name: str, header: Sequence[str], rows: Sequence[Sequence[str]], file: Path = README) -> None:
    """Puts the table in place of the one marked `name`. Raises ValueError where the file has no such marks."""
    text = file.read_text(encoding="utf-8")
    place = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?({re.escape(END)})", re.DOTALL)
    if not place.search(text):
        raise ValueError(f"{file.name} has no '<!-- table: {name} -->' followed by '{END}': add both where it belongs.")
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    partial = file.with_suffix(".part")
    partial.write_text(place.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], text), encoding="utf-8")
    partial.replace(file)


def rounded(value: float | None, places: int) -> str:
    """The number as it stands in the file; empty when it was not measured."""
    if value is None:
        return ""
    return f"{value:.{places}f}".rstrip("0").rstrip(".") if math.isfinite(value) else str(value)


def device_name(device: str) -> str:
    """The GPU's own name, or the processor's with its threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{processor()} ({torch.get_num_threads()} threads)"


def processor() -> str:
    """What /proc/cpuinfo calls the processor; elsewhere what Python calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0].replace(";", ",").replace(":", "")
