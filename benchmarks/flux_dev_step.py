"""One full step of a FLUX.1-dev-size transformer with random weights on a GPU, by every stack, in one process.

    python benchmarks/flux_dev_step.py                         # everything, an hour-class run where all is installed
    python benchmarks/flux_dev_step.py --sizes 1024x1024 --only eager,ours-bf16,ours-fp8 --budget 200

Times are medians of CUDA events. A stack's first call runs with an empty compile cache. Errors are relative L2
distances of the model's output to the same weights in bfloat16 (eager) and in float32. Rows are
written as they are measured.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reused_step import rows as reused_rows
from step_model import make_inputs, make_model
from step_stacks import MAIN, STACKS, cudnn, ours
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
COLUMNS = ("stack", "size", "ms_per_step", "first_call_s", "graphs", "peak_gib", "rel_l2_bf16", "rel_l2_fp32")
SIZES = ("1024x1024", "512x512", "1536x1024", "2048x2048")


def main() -> None:
    """Measures what was asked for, as long as the budget lasts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="stacks, with commas between")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds after which no further stack is begun")
    parser.add_argument(
        "--more-sizes", type=float, default=3600.0, help="seconds after which only the first is measured"
    )
    parser.add_argument(
        "--inexact", default="", help="sizes whose output is not compared with float32's, which takes long"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="a few blocks of small width, to try the script out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "flux_dev_step.csv")
    parser.add_argument("--profile", action="store_true", help="prints where each stack's time goes at the first size")
    parser.add_argument("--reused", action="store_true", help="a reused step too, at the first size")
    parser.add_argument("--graphs", action="store_true", help="counts graphs over what a user changes between runs")
    parser.add_argument("--table", action="store_true", help="only writes the README's table from the committed file")
    args = parser.parse_args()
    if args.table:
        table(args.out)
        return
    begun = time.perf_counter()
    args.until = begun + args.more_sizes
    torch.set_grad_enabled(False)
    model = make_model(args.device, tiny=args.tiny)
    sizes = [tuple(int(n) for n in size.split("x")) for size in args.sizes.split(",")]
    inputs = {size: make_inputs(model, *size) for size in sizes}
    print(f"model in {time.perf_counter() - begun:.0f} s", flush=True)
    compared = {size: given for size, given in inputs.items() if size_name(size) not in args.inexact.split(",")}
    exact = {size: value.cpu() for size, value in reference_fp32(model, compared).items()}
    plain = {size: model(**given)[0].float().cpu() for size, given in inputs.items()}
    print(f"references after {time.perf_counter() - begun:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    if args.reused:
        for name, ms in reused_rows(model, cudnn, inputs[sizes[0]], ours(), profile=args.profile):
            row = {"stack": name, "size": size_name(sizes[0]), "ms_per_step": round(ms, 2)}
            rows.append({c: "" for c in COLUMNS} | row)
            print(f"{name}  {ms:.2f}", flush=True)
            write(rows, args.out)
        free()
    if args.graphs:
        rows.append({c: "" for c in COLUMNS} | new_graphs(args.device, tiny=args.tiny))
        print(f"{rows[-1]['stack']}  {rows[-1]['graphs']}", flush=True)
        write(rows, args.out)
        free()
    for name, stack in STACKS.items():
        if args.only and name not in args.only.split(","):
            continue
        if time.perf_counter() - begun > args.budget:
            print(f"{name}: left out, the budget of {args.budget:.0f} s is spent", flush=True)
            continue
        try:
            for row in measure(name, stack, model, inputs, plain, exact, args):
                rows.append(row)
                print("  ".join(f"{row[c]}" for c in COLUMNS), flush=True)
                write(rows, args.out)
        except Exception as error:  # one stack's trouble must not lose the others' rows
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True)
            if os.environ.get("TRACE"):
                raise
        free()


def size_name(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def new_graphs(device: str, *, tiny: bool) -> dict[str, Any]:
    """The row of the graphs that our stack compiles after its warm-up, over all that a user changes between runs.

    Two double and two single blocks stand for all: graphs are counted by class of block.
    """
    import hasten

    model = make_model(device, tiny=tiny, num_layers=2, num_single_layers=2)
    graphs = ours("fp8")(model)
    sizes = ((1024, 1024), (768, 768), (512, 512), (1536, 1024), (1024, 768), (640, 1152))
    recipes: list[dict[str, Any]] = [
        {"method": "none"},
        {"method": "fbcache", "threshold": 0.1},
        {"method": "mbcache", "threshold": 0.3},
        {"method": "interval", "every": 2, "predictor": "taylor", "order": 2},
    ]

    def call(size: tuple[int, int], batch: int = 1) -> None:
        given = make_inputs(model, *size)
        for name, value in given.items():
            if isinstance(value, Tensor) and not name.endswith("_ids"):
                given[name] = value.repeat(batch, *[1] * (value.dim() - 1))
        model(**given)

    call(sizes[0]), call(sizes[1]), call(sizes[0], 2)
    warm = graphs()
    for number, size in enumerate(sizes):
        call(size, 1 + number % 3)
    for cache in recipes:
        handle = hasten.apply(model, {"schema": 1, "cache": cache})
        with handle.run([1.0, 0.75, 0.5, 0.25, 0.0]):
            for sigma in (1.0, 0.75, 0.5, 0.25):
                model(**make_inputs(model, *sizes[1]) | {"timestep": torch.full((1,), sigma, device=device)})
        handle.remove()
    layer = model.transformer_blocks[0].norm1.linear  # 8-bit layers are merged before they are quantised
    for sign in (1, -1):
        layer.weight.add_(sign * 2.0**-10)
        call(sizes[0])
    what = "after warm-up: 6 sizes, 3 batches, 4 recipes, a LoRA merged and taken out"
    return {"stack": f"ours-fp8 {what}", "size": "6 sizes", "graphs": graphs() - warm}


def reference_fp32(model: Any, inputs: dict[Any, dict[str, Any]]) -> dict[Any, Tensor]:
    """Outputs of the same weights and inputs in float32, without TF32."""
    exact = copy.deepcopy(model).float()
    out = {}
    for size, given in inputs.items():
        wide = {k: v.float() if isinstance(v, Tensor) else v for k, v in given.items()}
        out[size] = exact(**wide)[0]
    del exact
    free()
    return out


def measure(
    name: str,
    stack: Callable[[Any], Callable[[], int]],
    model: Any,
    inputs: dict[Any, dict[str, Any]],
    plain: dict[Any, Tensor],
    exact: dict[Any, Tensor],
    args: argparse.Namespace,
) -> Any:
    """One row for each size. `stack` transforms a copy of the model and gives back how to count its graphs."""
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ[variable] = str(Path(folder) / variable)
        own = copy.deepcopy(model)
        begun = time.perf_counter()
        graphs = stack(own)
        if args.device == "cuda":
            torch.cuda.synchronize()
        print(f"{name}: prepared in {time.perf_counter() - begun:.1f} s", flush=True)
        for number, (size, given) in enumerate(inputs.items()):
            if number and (name not in MAIN or args.until < time.perf_counter()):
                return
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            begun = time.perf_counter()
            out = own(**given)[0].float().cpu()
            first = time.perf_counter() - begun
            if number == 0:
                print(f"{name}: first call {first:.1f} s", flush=True)
            times = timed(lambda given=given: own(**given), args)
            yield {
                "stack": name,
                "size": size_name(size),
                "ms_per_step": round(times, 2),
                "first_call_s": round(first, 2),
                "graphs": graphs(),
                # The unchanged model that the stacks are copied from is not part of a stack.
                "peak_gib": round(peak_gib(args.device) - size_gib(model), 2),
                "rel_l2_bf16": round(distance(out, plain[size]), 5),
                "rel_l2_fp32": round(distance(out, exact[size]), 5) if size in exact else "",
            }
            if args.profile and number == 0:
                profile(lambda given=given: own(**given))


def timed(call: Callable[[], Any], args: argparse.Namespace) -> float:
    """Median milliseconds of a call; of fewer than was asked for, but of five, where that takes over two seconds."""
    for _ in range(3):
        call()
    times: list[float] = []
    for _ in range(args.repeats):
        if len(times) >= 5 and sum(times) > 2000:
            break
        if args.device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            begun = time.perf_counter()
            call()
            times.append((time.perf_counter() - begun) * 1000)
    return statistics.median(times)


def profile(call: Callable[[], Any]) -> None:
    """Where the time of a few calls in a row goes: kernels, what lies between them, and the clock that they ran at."""
    from torch.profiler import ProfilerActivity

    calls = 4
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    kernels = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels) / calls / 1000
    spans = [e.time_range for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    whole = (max(s.end for s in spans) - min(s.start for s in spans)) / calls / 1000 if spans else 0.0
    print(f"  {whole:.1f} ms a call from the first kernel to the last, {total:.1f} ms in kernels; {clocks(call)}")
    for e in kernels[:12]:
        print(f"  {e.self_device_time_total / calls / 1000:7.2f} ms {e.count // calls:4d} x  {e.key[:100]}")


def clocks(call: Callable[[], Any]) -> str:
    """The GPU's clock, power and reasons for slowing down while calls follow one another for a second."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,power.draw,power.limit,clocks_throttle_reasons.active"]
    try:
        watch = subprocess.Popen([*query, "--format=csv,noheader", "-lms", "100"], stdout=subprocess.PIPE, text=True)
    except OSError:
        return "no nvidia-smi"
    begun = time.perf_counter()
    while time.perf_counter() - begun < 1.2:
        call()
        torch.cuda.synchronize()
    watch.terminate()
    lines = watch.communicate()[0].strip().splitlines()
    return "clock, its maximum, power, its limit, reasons: " + (lines[len(lines) * 3 // 4] if lines else "unknown")


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 distance."""
    return float((found - wanted).norm() / wanted.norm())


def peak_gib(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0


def size_gib(model: Any) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30 if model.device.type == "cuda" else 0.0


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """The rows measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def table(path: Path) -> None:
    """The README's table, as the file has it."""
    from tables import rewrite

    header = ("stack", "size", "ms a step", "first call, s", "graphs", "peak, GiB", "error to bf16", "error to float32")
    with path.open(newline="", encoding="utf-8") as file:
        rewrite("flux_dev_step", header, [[row[c] for c in COLUMNS] for row in csv.DictReader(file)])


if __name__ == "__main__":
    main()
