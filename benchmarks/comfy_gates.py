#!/usr/bin/env python3
"""What our Python costs per block in ComfyUI: 57 blocks of almost no arithmetic, with gates and with a bare hook.

    PYTHONPATH=tests python benchmarks/comfy_gates.py

The fakes of tests/fake_comfy.py stand in for ComfyUI, so that nothing but the hooks is measured: processor time of one
thread beyond that of a bare pass-through hook, least of some runs. The law is 20 microseconds a block.
Rewrites results/comfy_gates.csv.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import fake_comfy
import torch
from tables import device_name

from hasten.hosts import comfy
from hasten.recipe import Recipe

STEPS, ROUNDS, LAW_US = 20, 7, 20.0
BLOCKS = 57  # FLUX.1's
TABLE = Path(__file__).with_name("results") / "comfy_gates.csv"


def main() -> None:
    torch.set_num_threads(1)
    flux = fake_comfy.Flux(double=19, single=38)

    def hook(args: Any, extra: Any) -> Any:
        return extra["original_block"](args)

    bare = fake_comfy.Patcher(fake_comfy.Base(flux))
    hooked = fake_comfy.Patcher(fake_comfy.Base(flux))
    dit = {("double_block", i): hook for i in range(19)} | {("single_block", i): hook for i in range(38)}
    hooked.model_options["transformer_options"]["patches_replace"] = {"dit": dit}
    baseline = seconds(hooked)
    device = device_name("cpu")
    rows = []
    print(f"{'':<34}{'us a block':>12}")
    for name, cache in {
        "every block run (interval 1)": {"method": "interval", "every": 1},
        "measured, never reused (fbcache 0)": {"method": "fbcache", "threshold": 0.0},
    }.items():
        ours = comfy.put_recipe(bare, Recipe.from_dict({"schema": 1, "cache": cache}))
        each = (seconds(ours) - baseline) / (STEPS * BLOCKS) * 1e6
        print(f"{name:<34}{each:>12.1f}  {'ok' if each <= LAW_US else f'over {LAW_US:g}'}")
        rows.append({"host": "comfyui", "device": device, "blocks": BLOCKS, "steps": STEPS, "what": name,
                     "us_per_block": round(each, 1), "law_us": LAW_US})  # fmt: skip
    with TABLE.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def seconds(model: Any) -> float:
    """The least processor time of a few runs."""
    noise = torch.randn(1, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(1))
    sigmas = torch.linspace(1.0, 0.0, STEPS + 1)
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.thread_time()
        fake_comfy.Guider(model, [text]).sample(noise, sigmas)
        best = min(best, time.thread_time() - started)
    return best


if __name__ == "__main__":
    main()
