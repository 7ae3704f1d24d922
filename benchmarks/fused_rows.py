"""Our fused passes against what inductor makes of the same arithmetic, and the matrix products around them, at
FLUX.1-dev's sizes on one GPU.

    python benchmarks/fused_rows.py                  # writes benchmarks/results/fused_rows.csv
    python benchmarks/fused_rows.py --tokens 16896   # 2048x2048

Each pass is first checked against float32; then microseconds by CUDA events (cold L2), beside the floor: bytes in and
out over 4.27 TB/s for a pass, operations over 690 (bf16) or 1300 (fp8) T/s for a product.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from hasten.kernels import linear, rows  # noqa: E402
from hasten.kernels.modulation import modulation, modulation_by_torch  # noqa: E402

COPY = 4.27e12  # bytes a second, read and written, measured on an H200
FP8 = torch.float8_e4m3fn
C, HEADS, D, TEXT = 3072, 24, 128, 512


def main() -> None:
    """Checks, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4608, help="image and text together")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "fused_rows.csv")
    parser.add_argument("--skip-inductor", action="store_true")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    table = [*passes(args.tokens, inductor=not args.skip_inductor), *products(args.tokens), *modulations()]
    columns = ("what", "us", "inductor_us", "floor_us", "error")
    for row in table:
        print("  ".join(f"{row.get(c, '')!s:>10}" for c in columns[1:]), row["what"], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)


def noise(*shape: int, size: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * size).to(torch.bfloat16)


def passes(tokens: int, *, inductor: bool) -> Any:
    """The element-wise passes of a block."""
    image = tokens - TEXT
    text, img, update = noise(1, TEXT, C), noise(1, image, C), noise(tokens, C)
    mods = noise(1, 6 * C), noise(1, 6 * C)
    hidden, wide = noise(tokens, 4 * C), noise(tokens, 7 * C)
    joint = noise(1, tokens, C)
    norms = tuple(noise(D) for _ in range(4))
    angles = torch.rand(tokens, D // 2, device="cuda") * 6
    rope = angles.cos().repeat_interleave(2, 1)[:, ::2], angles.sin().repeat_interleave(2, 1)[:, ::2]
    stream = tokens * C  # elements
    shape = {"batch": 1, "length": TEXT, "heads": HEADS}
    cases: list[tuple[str, Callable[[], Any], Callable[[], Any], float]] = []
    for name, dtype, out in (("bf16", None, 2), ("fp8", FP8, 1), ("int8", torch.int8, 1)):
        kind = dtype or torch.bfloat16
        cases += [
            (
                f"norm_modulate {name}",
                lambda dtype=dtype: rows.norm_modulate(text, img, *mods, shift=0, scale=1, joint=True, dtype=dtype),
                lambda kind=kind: rows.norm_modulate_by_torch(text, img, *mods, 0, 1, True, 1e-6, kind),
                stream * (2 + out),
            ),
            (
                f"add_norm_modulate {name}",
                lambda dtype=dtype: rows.add_norm_modulate(
                    text, img, update, *mods, gate=2, shift=3, scale=4, dtype=dtype
                ),
                lambda kind=kind: rows.add_norm_modulate_by_torch(text, img, update, *mods, 2, 3, 4, 1e-6, kind),
                stream * (6 + out),
            ),
            (
                f"gelu {name}",
                lambda dtype=dtype: rows.gelu_beside(None, hidden, dtype=dtype),
                lambda kind=kind: rows.gelu_beside_by_torch(None, hidden, kind),
                stream * 4 * (2 + out),
            ),
            (
                f"gelu beside attention {name}",
                lambda dtype=dtype: rows.gelu_beside(update, wide[:, 3 * C :], dtype=dtype),
                lambda kind=kind: rows.gelu_beside_by_torch(update, wide[:, 3 * C :], kind),
                stream * 5 * (2 + out),
            ),
        ]
    cases += [
        (
            "split_streams fp8",
            lambda: rows.split_streams(joint, TEXT, dtype=FP8),
            lambda: rows.split_streams_by_torch(joint, TEXT, FP8),
            stream * 3,
        ),
        (
            "add_gated",
            lambda: rows.add_gated(text, img, update, *mods, gate=2, joint=True),
            lambda: rows.add_gated_by_torch(text, img, update, *mods, 2, True),
            stream * 6,
        ),
        (
            "norm_rope",
            lambda: rows.norm_rope(wide, norms, rope, joint=True, **shape),
            lambda: rows.norm_rope_by_torch(wide, *norms, *rope, 1, TEXT, HEADS, True, 1e-6),
            stream * 12,
        ),
    ]
    for name, ours, plain, moved in cases:
        row = {"what": name, "us": clock(ours), "floor_us": round(moved / COPY * 1e6, 1)}
        row["error"] = f"{largest_error(ours(), plain()):.1e}"
        if inductor:
            torch._dynamo.reset()
            row["inductor_us"] = clock(torch.compile(plain, dynamic=False))
        yield row


def products(tokens: int) -> Any:
    """Matrix products in the forms that a block may choose from."""
    x = noise(tokens, C)
    x8, xs = rows.split_streams(x[None], 0, dtype=FP8)

    def layer(width: int, inner: int = C) -> tuple[Tensor, Tensor]:
        return noise(width, inner, size=inner**-0.5), noise(width)

    def eight(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, scales = rows.quantise(weight, FP8)
        return values, scales.flatten(), bias

    one = torch.ones((), device="cuda")
    for width, inner in ((3 * C, C), (4 * C, C), (7 * C, C), (C, C), (C, 4 * C), (C, 5 * C)):
        given = x if inner == C else noise(tokens, inner)
        given8, scales = rows.split_streams(given[None], 0, dtype=FP8)
        weight, bias = layer(width, inner)
        weight8, weight_scales, _ = eight(weight, bias)
        work = 2 * tokens * width * inner
        at = f"{inner} to {width}"
        yield product(f"bf16 {at}", lambda g=given, w=weight, b=bias: torch.addmm(b, g, w.t()), work, 690)
        yield product(
            f"fp8 by rows {at}",
            lambda g=given8, s=scales, w=weight8, t=weight_scales, b=bias: linear.linear_rows_8(
                g, s, 0, (), [(w, t, b)], torch.bfloat16
            ),
            work,
            1300,
        )
        yield product(
            f"fp8 one scale {at}",
            lambda g=given8, w=weight8, b=bias: torch._scaled_mm(
                g, w.t(), one, one, bias=b, out_dtype=torch.bfloat16, use_fast_accum=True
            ),
            work,
            1300,
        )
    three = [layer(C) for _ in range(3)]
    work = 2 * tokens * C * 3 * C
    yield product("bf16 three layers one by one", lambda: linear.linear_rows(x, 0, (), three), work, 690)
    weights, biases = (linear.lay_together(t) for t in zip(*three, strict=True))
    laid = list(zip(weights, biases, strict=True))
    yield product("bf16 three layers laid together", lambda: linear.linear_rows(x, 0, (), laid), work, 690)
    weight, bias = layer(4 * C)
    work = 2 * tokens * C * 4 * C
    yield product(
        "bf16 with gelu as its last step", lambda: linear.linear_rows(x, 0, (), [(weight, bias)], gelu=True), work, 690
    )
    hidden = noise(tokens, 4 * C)
    down, bias5 = layer(C, 5 * C)
    work = 2 * tokens * 5 * C * C
    yield product("bf16 in two parts, 15360 to 3072", lambda: linear.linear_beside(x, hidden, down, bias5), work, 690)
    pair = layer(3 * C), layer(3 * C)
    work = 2 * tokens * C * 3 * C
    yield product("bf16 two streams", lambda: linear.linear_rows(x, TEXT, [pair[0]], [pair[1]]), work, 690)
    pair8 = eight(*pair[0]), eight(*pair[1])
    yield product(
        "fp8 two streams",
        lambda: linear.linear_rows_8(x8, xs, TEXT, [pair8[0]], [pair8[1]], torch.bfloat16),
        work,
        1300,
    )
    ends = torch.tensor([TEXT, tokens], device="cuda", dtype=torch.int32)
    both = torch.stack([pair[0][0], pair[1][0]]).transpose(1, 2)
    yield product("bf16 two streams, grouped", lambda: torch._grouped_mm(x, both, offs=ends), work, 690)
    both8 = torch.stack([pair8[0][0], pair8[1][0]]).transpose(1, 2)
    scales8 = torch.stack([pair8[0][1], pair8[1][1]])
    yield product(
        "fp8 two streams, grouped",
        lambda: torch._scaled_grouped_mm(
            x8, both8, xs.flatten(), scales8, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        work,
        1300,
    )


def modulations() -> Any:
    """A block's vector through silu and its modulation layers: both streams' of a double block, a single block's."""
    for width, streams in ((6 * C, 2), (3 * C, 1)):
        vector, weights = noise(1, C), [noise(width, C, size=C**-0.5) for _ in range(streams)]
        layers = [(weight, noise(width)) for weight in weights]
        exact = modulation_by_torch(vector.float(), [w.float() for w, _ in layers], [b.float() for _, b in layers])
        shape = f"{C} to {width}, one row" + (", two streams" if streams == 2 else "")
        forms: dict[str, Callable[[], Any]] = {
            f"modulation {shape}": lambda v=vector, found=layers: tuple(modulation(v, found)),
            f"modulation by torch {shape}": lambda v=vector, found=layers: by_torch(v, found),
        }
        for name, call in forms.items():
            yield {
                "what": name,
                "us": clock(call),
                "floor_us": round(streams * width * C * 2 / COPY * 1e6, 1),
                "error": f"{largest_error(call(), tuple(exact)):.1e}",
            }


def by_torch(vector: Tensor, layers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    given = torch.nn.functional.silu(vector)
    return tuple(torch.nn.functional.linear(given, weight, bias) for weight, bias in layers)


def product(name: str, call: Callable[[], Any], work: float, rate: float) -> dict[str, Any]:
    """A row of the table; a form that this torch or GPU lacks says so."""
    row: dict[str, Any] = {"what": name, "floor_us": round(work / rate / 1e6, 1)}
    try:
        row["us"] = clock(call)
    except RuntimeError as error:
        row["error"] = str(error).splitlines()[0][:60]
    return row


def clock(call: Callable[[], Any]) -> float:
    """Median microseconds of 20 calls, each behind a write of 1 GiB that empties the L2 cache."""
    flush = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    for _ in range(3):
        call()
    times = []
    for _ in range(20):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return round(statistics.median(times), 1)


def largest_error(found: Any, wanted: Any) -> float:
    """Relative L2 distance of what the tensors say, 8-bit rows times their scales."""
    found, wanted = ((t,) if isinstance(t, Tensor) else tuple(t) for t in (found, wanted))

    def said(tensors: tuple[Tensor, ...]) -> list[Tensor]:
        if tensors[-1].numel() and tensors[-1].shape[-1] == 1:  # the last are the scales of the tensor before them
            return [t.float() for t in tensors[:-2]] + [tensors[-2].float() * tensors[-1]]
        return [t.float() for t in tensors if t.numel()]

    return max(float((a - b).norm() / b.norm()) for a, b in zip(said(found), said(wanted), strict=True))


if __name__ == "__main__":
    main()
