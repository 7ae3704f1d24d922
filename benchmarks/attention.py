"""Attention at FLUX's sizes on one GPU: every back-end that can be used, its time and its error.

    python benchmarks/attention.py                   # writes benchmarks/results/attention.csv
    python benchmarks/attention.py --rounds 3        # shorter
    python benchmarks/attention.py --readme          # only the README's table, from the file
    python benchmarks/attention.py --keep-nano FILE  # only flux-nano's own q, k, v, into a file for --nano FILE

Noise with outlying keys at N = 4608 (1024x1024) and 16896 (2048x2048), 24 heads of 128, batch 1; and flux-nano's own
q, k, v of one step in the middle of a picture at 512x512. Each is first compared with float32 softmax in full (sparse
ones too: what they leave out counts as error), then timed with its preparation as a CUDA graph of several calls, the
median over rounds that alternate between back-ends. tflops counts the dense sum's 4 N^2 H D operations whatever is
left out.
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from tables import rewrite  # noqa: E402

from hasten.attention_backends import BACKENDS, SPARSE, Ask, sparse  # noqa: E402

COLUMNS = ("backend", "n", "head_dim", "density", "ms", "tflops", "rel_l1", "cosine", "input")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Row:
    """One back-end on one input; ms and tflops of the dense sum, None where a CUDA graph refused it."""

    backend: str
    n: int
    head_dim: int
    density: float
    ms: float | None
    tflops: float | None
    rel_l1: float
    cosine: float
    input: str


def noise(rows: int, heads: int = 24, dim: int = 128) -> list[Tensor]:
    """Normal q, k, v with six outlying channels and single outlying numbers in k."""
    made = torch.Generator("cuda").manual_seed(0)
    draw = functools.partial(torch.randn, device="cuda", generator=made)
    q, k, v = (draw((1, heads, rows, dim)) for _ in range(3))
    k[..., torch.randperm(dim, device="cuda", generator=made)[:6]] += draw((6,)) * 12
    k += (torch.rand(k.shape, device="cuda", generator=made) < 2e-4) * draw(k.shape) * 6
    return [t.bfloat16() for t in (q, k, v)]


def of_flux_nano(device: str = "cuda", step: int = 4, block: int = 7) -> list[Tensor]:
    """q, k, v of one block of flux-nano in the middle of a picture of 512x512."""
    from hasten.hosts.diffusers_attention import HungAttention
    from hasten.loading import Model, load_painter
    from hasten.recipe import Attention

    painter = load_painter(Model(), device=torch.device(device), dtype=torch.bfloat16)
    transformer = painter.pipe.transformer
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    hung = HungAttention(blocks, Attention("sdpa"))
    seen: list[list[Tensor]] = []
    attend = hung.attention.attend

    def recording(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append([q.clone(), k.clone(), v.clone()])
        return attend(q, k, v)

    hung.attention.attend = recording  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    painter.pipe(
        "a red ball above a blue cube", height=512, width=512, num_inference_steps=8, generator=generator,
        output_type="latent", max_sequence_length=64,
    )  # fmt: skip
    hung.remove()
    return seen[step * len(blocks) + block]


def of_nano(file: Path | None) -> list[Tensor]:
    """The same, from a file where there is one."""
    if file is None:
        return of_flux_nano()
    kept = load_file(file, "cuda")
    return [kept[name] for name in "qkv"]


def exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sum in float32, head by head."""
    out = torch.empty(q.shape, device="cuda")
    for head in range(q.shape[1]):
        weights = torch.softmax(q[:, head].float() @ k[:, head].float().mT * q.shape[-1] ** -0.5, -1)
        out[:, head] = weights @ v[:, head].float()
    return out


def candidates(ask: Ask) -> dict[tuple[str, float], Attend]:
    """What can be used for such calls, by name and density."""
    found: dict[tuple[str, float], Attend] = {}
    for name, backend in BACKENDS.items():
        verdict = backend.supports(ask)
        if not verdict.ok:
            print(f"{name}: {verdict.reason}")
        elif name == "sparse":
            found |= {(name, keep): sparse(keep, 512) for keep in (1.0, 0.5, 0.25)}
        else:
            found[name, 1.0 if backend.error < SPARSE else 0.5] = backend.attend
    return found


def graph_of(attend: Attend, given: list[Tensor], calls: int) -> torch.cuda.CUDAGraph | None:
    """Several calls as one graph, so that no launch on the host is timed; None where it cannot be recorded."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                attend(*given)
    except RuntimeError as error:
        print(f"no graph: {str(error).splitlines()[0][:100]}")
        torch.cuda.synchronize()
        return None
    graph.replay()
    return graph


def measure(name: str, given: list[Tensor], rounds: int) -> list[Row]:
    """One row for each back-end on one input."""
    q, k, _ = given
    rows, heads, dim = q.shape[2], q.shape[1], q.shape[3]
    exact = exactly(*given)
    work = 4 * rows * rows * heads * dim
    calls = max(1, min(20, int(3e12 / work)))
    table: list[Row] = []
    graphs: list[torch.cuda.CUDAGraph | None] = []
    for (backend, density), attend in candidates(Ask.of(q, k)).items():
        try:
            out = attend(*given).float()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{backend} failed: {type(error).__name__}: {error}".splitlines()[0][:160])
            continue
        apart = float((out - exact).abs().sum() / exact.abs().sum())
        cosine = float(torch.nn.functional.cosine_similarity(out.flatten(), exact.flatten(), dim=0))
        table.append(Row(backend, rows, dim, density, None, None, round(apart, 5), round(cosine, 6), name))
        graphs.append(graph_of(attend, given, calls))
    times: list[list[float]] = [[] for _ in table]
    for _ in range(rounds):
        for graph, found in zip(graphs, times, strict=True):
            if graph is None:
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / calls)
    for row, found in zip(table, times, strict=True):
        if found:
            row.ms = round(statistics.median(found), 4)
            row.tflops = round(work / row.ms / 1e9, 1)
    return table


def readme(file: Path) -> None:
    """The README's table from the file: each back-end's time against cuDNN's in the same run, and its error."""
    with file.open(encoding="utf-8", newline="") as opened:
        table = list(csv.DictReader(opened))
    found = {(row["backend"], row["density"], row["input"], row["n"]): row for row in table}
    sizes = sorted({int(row["n"]) for row in table if row["input"] == "noise"})
    rows = []
    for backend, density in dict.fromkeys((row["backend"], row["density"]) for row in table):
        cells = [backend if density == "1.0" else f"{backend}, {density} of the blocks"]
        for n in sizes:
            row, base = found[backend, density, "noise", str(n)], found["cudnn", "1.0", "noise", str(n)]
            cells.append(f"{float(row['ms']):.3f} ({float(base['ms']) / float(row['ms']):.2f}x)")
        cells.append(f"{float(found[backend, density, 'noise', str(sizes[0])]['rel_l1']):.4f}")
        own = [row for key, row in found.items() if key[:2] == (backend, density) and key[2] == "flux-nano"]
        cells.append(f"{float(own[0]['rel_l1']):.4f}" if own else "-")
        rows.append(cells)
    heads = [f"N = {n}, ms (against cuDNN)" for n in sizes]
    rewrite("attention", ("back-end", *heads, "error on noise", "error on flux-nano"), rows)


def main() -> None:
    """Measures, writes the table, and the README's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="*", default=[4608, 16896])
    parser.add_argument("--without-nano", action="store_true", help="leave flux-nano's own q, k, v out")
    parser.add_argument("--keep-nano", type=Path, metavar="FILE", help="only write flux-nano's q, k, v, on any machine")
    parser.add_argument("--nano", type=Path, metavar="FILE", help="take flux-nano's q, k, v from there")
    parser.add_argument("--readme", action="store_true", help="only rewrite the README's table from the file")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "attention.csv")
    given = parser.parse_args()
    if given.readme:
        readme(given.out)
        return
    if given.keep_nano:
        kept = of_flux_nano("cuda" if torch.cuda.is_available() else "cpu")
        save_file({name: t.contiguous().cpu() for name, t in zip("qkv", kept, strict=True)}, given.keep_nano)
        return
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU; without one `hasten doctor` says what could be used.")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    with given.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        inputs = [("noise", functools.partial(noise, rows)) for rows in given.sizes]
        if not given.without_nano:
            inputs.append(("flux-nano", functools.partial(of_nano, given.nano)))
        for name, make in inputs:
            for row in measure(name, make(), given.rounds):
                writer.writerow(asdict(row))
                print(*asdict(row).values(), sep="\t", flush=True)
            file.flush()
    if given.out == parser.get_default("out") and not given.without_nano:
        readme(given.out)


if __name__ == "__main__":
    main()
