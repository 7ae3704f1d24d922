"""What a full and a partial evaluation cost under token caching, on a FLUX.1-dev-size transformer with random weights.

    python benchmarks/toca_step.py                # one GPU, 1024x1024, bfloat16, eager; about a minute
    PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync python benchmarks/toca_step.py --check  # under ComfyUI's allocator
    python benchmarks/toca_step.py --table        # only writes NOTES.md's table from the committed file
    python benchmarks/toca_step.py --tiny --device cpu --size 64x64

Checks the kernels against torch and recordings against launches first, then times with CUDA events: stock, full
evaluations and partial ones in turn, medians. Rewrites results/toca_step.csv and NOTES.md's table (not with --tiny).
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from step_model import make_inputs, make_model  # noqa: E402

import hasten  # noqa: E402
from hasten.kernels import chosen_rows, eight_rows, gated_forecast, gated_sum, received, rotation  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "toca_step.csv"
COLUMNS = (
    "device", "size", "recipe", "full_ms", "over_stock", "partial_ms", "share_of_stock", "cache_gib", "more_gib",
    "stock_ms",
)  # fmt: skip
RECIPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "toca attention": ("toca", {}, {}),
    "modules taylor1": ("modules", {"predictor": "taylor"}, {}),
    "toca attention fp8": ("toca", {}, {"memory": "fp8"}),
    "modules hold": ("modules", {}, {}),
    "toca value": ("toca", {}, {"score": "value"}),
    "toca random": ("toca", {}, {"score": "random"}),
    "toca attention, launched": ("toca", {}, {"record": False}),
    "toca attention, all queries": ("toca", {}, {"queries": 0}),
    "toca attention host": ("toca", {}, {"memory": "host"}),
}


def main() -> None:
    """Checks, times, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1024x1024", help="width x height")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=75.0, help="seconds after which no further recipe is begun")
    parser.add_argument("--only", default="", help="recipes whose name contains this")
    parser.add_argument("--check", action="store_true", help="only checks")
    parser.add_argument("--profile", type=Path, help="first writes there where the first recipe's time goes")
    parser.add_argument("--tiny", action="store_true", help="a few blocks of small width, to try the script out")
    parser.add_argument("--table", action="store_true", help="only writes NOTES.md's table from the committed file")
    given = parser.parse_args()
    if given.table:
        table()
        return
    begun = time.perf_counter()
    torch.set_grad_enabled(False)
    furthest = 0.0
    if given.device.startswith("cuda"):
        check_kernels()
        furthest = check_recording()
        with torch.inference_mode():  # as ComfyUI samples
            furthest = max(furthest, check_recording())
        print(f"kernels do as torch does, after {time.perf_counter() - begun:.0f} s", flush=True)
    if given.check:
        sys.exit(f"what was played differs by {furthest:.3g}" if furthest > 0.0 else 0)
    model = make_model(given.device, tiny=given.tiny)
    inputs = make_inputs(model, *map(int, given.size.split("x")))
    stock = statistics.median(timed(lambda: model(**inputs)) for _ in range(given.repeats + 2))
    print(f"stock {stock:.1f} ms, after {time.perf_counter() - begun:.0f} s", flush=True)
    if given.profile:
        profile(model, inputs, given.profile)
        print(f"profile written after {time.perf_counter() - begun:.0f} s", flush=True)
    rows = []
    for name, (method, cache, tokens) in RECIPES.items():
        if given.only not in name or time.perf_counter() - begun > given.budget:
            continue
        recipe = {"schema": 1, "cache": {"method": method, "every": 2, **cache}, "tokens": tokens}
        full, partial, gib, more, reference = measure(model, inputs, recipe, given.repeats)
        shown = (f"{full:.2f}", f"{full / reference - 1:+.3f}", f"{partial:.2f}", f"{partial / reference:.3f}")
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        rows.append((where, given.size, name, *shown, f"{gib:.2f}", f"{more:.2f}", f"{reference:.2f}"))
        print("  ".join(rows[-1][2:]), flush=True)
        if not given.tiny:
            write(rows, RESULTS)
    print(f"\n{'recipe':28} full ms (over stock)  partial ms (of stock)  GiB   [{time.perf_counter() - begun:.0f} s]")
    for _, _, name, full, over, partial, share, gib, more, _ in rows:
        print(f"{name:28} {full:>8} ({over})      {partial:>8} ({share})   {gib:>8} {more:>6}")
    if not given.tiny:
        table()


def table() -> None:
    """NOTES.md's table, as the file has it."""
    from tables import rewrite

    header = ("recipe", "full, ms", "over stock", "in part, ms", "of stock", "kept, GiB", "more reserved, GiB")
    with RESULTS.open(newline="", encoding="utf-8") as file:
        rows = [[row[c] for c in COLUMNS[2:9]] for row in csv.DictReader(file)]
    rewrite("toca_step", header, rows, ROOT / "benchmarks" / "NOTES.md")


def measure(
    model: Any, inputs: dict[str, Any], recipe: dict[str, Any], repeats: int
) -> tuple[float, float, float, float, float]:
    """Milliseconds of a full and of a partial evaluation, GiB of the cache and of all that torch reserved more than for
    stock, and stock's milliseconds beside them."""
    before = reserved(lambda: model(**inputs))
    handle = hasten.apply(model, recipe)
    steps = 2 * repeats + 8
    sigmas = [1.0 - i / steps for i in range(steps + 1)]
    found: dict[str, list[float]] = {"compute": [], "partial": [], "stock": []}
    with handle.run(sigmas):
        reserved(lambda: None)
        for sigma in sigmas[: 3 + 2 * repeats]:
            timestep = torch.full_like(inputs["timestep"], sigma)
            elapsed = timed(lambda timestep=timestep: model(**{**inputs, "timestep": timestep}))
            found[handle.reports[-1].evaluations[-1].decision].append(elapsed)
        more = (torch.cuda.max_memory_reserved() / 2**30 - before) if torch.cuda.is_available() else 0.0
    report = handle.reports[-1]
    handle.remove()
    # Beside it and not before all: the clock of a GPU under load moves.
    found["stock"] = [timed(lambda: model(**inputs)) for _ in range(repeats)]
    first = {"compute": 2, "partial": 2, "stock": 0}  # the first of a kind compile or record what stays
    full, partial, stock = (statistics.median(found[kind][first[kind] :]) for kind in ("compute", "partial", "stock"))
    return full, partial, report.cache_mib / 1024, more, stock


def reserved(run: Callable[[], Any]) -> float:
    """GiB that torch's allocator held at most while that ran, after giving back what it held before."""
    if not torch.cuda.is_available():
        run()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved() / 2**30


def profile(model: Any, inputs: dict[str, Any], file: Path) -> None:
    """Writes the twelve dearest kernels of a full and of a partial evaluation, played and launched one by one."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    lines = []
    for record in (True, False):
        recipe = {"schema": 1, "cache": {"method": "toca", "every": 2}, "tokens": {"record": record}}
        handle = hasten.apply(model, recipe)
        sigmas = [1.0 - i / 12 for i in range(13)]
        with handle.run(sigmas):
            for i, sigma in enumerate(sigmas[:8]):
                given = {**inputs, "timestep": torch.full_like(inputs["timestep"], sigma)}
                if i < 6 or (i == 6 and not record):
                    model(**given)
                    continue
                with profiling(activities=kinds) as found:
                    elapsed = timed(lambda given=given: model(**given))
                lines += [f"{'full' if i == 6 else 'part'}, {'played' if record else 'launched'}: {elapsed:.2f} ms"]
                lines += _dearest(found)
        handle.remove()
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _dearest(found: Any) -> list[str]:
    """The profile's sums and its twelve dearest entries, on the device where there is one."""
    device = torch.cuda.is_available()
    events = [e for e in found.key_averages() if not device or str(e.device_type).endswith("CUDA")]
    key = (lambda e: e.self_device_time_total) if device else (lambda e: e.self_cpu_time_total)
    host = sum(e.self_cpu_time_total for e in found.key_averages())
    launched = sum(e.count for e in events)
    total = sum(key(e) for e in events)
    lines = [f"  host {host / 1e3:.2f} ms, device {total / 1e3:.2f} ms, {launched} launches"]
    dearest = sorted(events, key=key, reverse=True)[:12]
    return lines + [f"  {key(e) / 1e3:8.3f} ms {e.count:5} x  {e.key[:90]}" for e in dearest]


def timed(run: Callable[[], Any]) -> float:
    """Milliseconds of the work, by CUDA events or the clock."""
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        run()
        return (time.perf_counter() - begun) * 1000.0
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def check_kernels() -> None:
    """Each kernel at FLUX's shapes against its plain torch form."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    q, k = noise(1, 24, 256, 128), noise(1, 24, 4608, 128)
    found, expected = received.launch(received.triton_kernel(), q, k), received._attention_received._init_fn(q, k)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-6)
    angle = torch.randn(4608, 64, device="cuda")
    found = rotation.launch(rotation.triton_kernel(), k, angle.cos(), angle.sin())
    torch.testing.assert_close(found, rotation._rotated._init_fn(k, angle.cos(), angle.sin()), rtol=2**-7, atol=2e-2)
    x, a, b = noise(1, 4608, 3072), noise(1, 4608, 3072), noise(1, 4608, 3072)
    gate, gate_b, scale, shift = (noise(1, 1, 3072) for _ in range(4))
    index = torch.randperm(4608, device="cuda")[:600]
    by_token = k.transpose(1, 2).contiguous().transpose(1, 2)
    found = rotation.launch(rotation.triton_kernel(), by_token, angle.cos(), angle.sin())
    torch.testing.assert_close(found, rotation._rotated._init_fn(k, angle.cos(), angle.sin()), rtol=2**-7, atol=2e-2)
    weights = torch.tensor([0.5, -1.5, 2.0], device="cuda")
    given = (x, weights, gate, [a, b, x], gate_b, [b, x, a])
    found = gated_forecast.launch(gated_forecast.triton_kernel(), *given)
    torch.testing.assert_close(found, gated_forecast.in_torch(*given), rtol=2**-6, atol=0.1)
    data = torch.zeros(4608, 3072, device="cuda").to(torch.float8_e4m3fn)
    steps = torch.ones(4608, 1, device="cuda")
    eight_rows.launch_pack(eight_rows.triton_kernels(), x[0], data, steps, None)
    found = eight_rows.unpack(data, steps, x.dtype, index)
    torch.testing.assert_close(found, x[0, index], rtol=2**-3, atol=0.05)
    found = gated_sum.launch(gated_sum.triton_kernel(), x, gate, a, gate_b, b)
    torch.testing.assert_close(found, gated_sum._gated_sum._init_fn(x, gate, a, gate_b, b), rtol=2**-6, atol=0.1)
    found = chosen_rows.launch(chosen_rows.triton_kernel(), x, index, scale, shift, 1e-6, gate, a)
    expected = chosen_rows._chosen_rows._init_fn(x, index, scale, shift, 1e-6, gate, a)
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=0.1)


def check_recording() -> float:
    """The largest difference of evaluations in part that are played from a recording to those that are launched."""
    print(f"allocator: {torch.cuda.get_allocator_backend()}", flush=True)
    largest = 0.0
    model = make_model("cuda", tiny=True)
    inputs = make_inputs(model, 256, 256)
    sigmas = [1.0 - i / 14 for i in range(15)]
    for method, cache, tokens in (
        ("toca", {}, {}),
        ("toca", {}, {"memory": "fp8", "score": "random"}),
        ("duca", {}, {"memory": "bf16"}),
        ("modules", {}, {}),
        ("modules", {"predictor": "taylor", "order": 2}, {}),
        ("modules", {"predictor": "taylor"}, {"memory": "fp8"}),
    ):
        outputs = []
        for record in (True, False):
            cache = {"method": method, "every": 4, **cache}
            recipe = {"schema": 1, "cache": cache, "tokens": {**tokens, "record": record}}
            handle = hasten.apply(model, recipe)
            with handle.run(sigmas):
                of = [model(**{**inputs, "timestep": torch.full_like(inputs["timestep"], s)})[0] for s in sigmas[:-1]]
            outputs.append(torch.stack(of).float())
            if handle.report.notes:
                print(f"{method}, record {record}: {handle.report.notes}", flush=True)
            handle.remove()
        furthest = (outputs[0] - outputs[1]).abs().nan_to_num(float("inf")).max().item()
        how = " ".join(map(str, (*cache.values(), *tokens.values())))
        print(f"{how}: played against launched, largest difference {furthest:.3g}", flush=True)
        largest = max(largest, furthest)
    return largest


def write(rows: list[tuple[str, ...]], file: Path) -> None:
    """The table as CSV: beside it first, then in its place."""
    partial = file.with_suffix(".part")
    with partial.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    partial.replace(file)


if __name__ == "__main__":
    main()
