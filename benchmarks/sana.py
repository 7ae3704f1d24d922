"""Where Sana's time goes, text to pixels: as diffusers runs it, fused and compiled, and with a cache; random weights.

    python benchmarks/sana.py                                # 600M and 1600M at 1024x1024 and 4096x4096
    python benchmarks/sana.py --sizes 1600M --sides 1024     # about a minute and a half
    python benchmarks/sana.py --sides 4096 --ways eager "all compiled" --add    # beside what the file has already
    python benchmarks/sana.py --table benchmarks/results/sana.csv               # only the README's table
    python benchmarks/sana.py --tiny --device cpu            # proves that it runs, its figures mean nothing

Random weights take the time of trained ones and say nothing of pictures. What is timed is a SanaPipeline's whole call:
Gemma-2-2b on the prompt behind its instruction and on an empty one, 20 guided steps, DC-AE's decoder (in tiles above
2048), in bfloat16. Each stack without a cache is held against itself, twice and with gates that never reuse
(gates_exact: the same to the bit), and its latents against diffusers' own (latents_off). Rewrites
benchmarks/results/sana.csv after each way of drawing, of which one that fails is told and left out; prints a short
table last. Above 2048 one call is timed: its steps end where the device was waited for behind the last one.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tables
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

RESULTS = ROOT / "benchmarks" / "results" / "sana.csv"
PROMPT, STEPS, GUIDANCE = "a lighthouse on a cliff at dusk, waves below, the lamp already lit", 20, 4.5
SIZES: dict[str, dict[str, int]] = {
    "600M": {"num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_dim": 1152,
             "cross_attention_head_dim": 72},
    "1600M": {"num_layers": 20, "num_attention_heads": 70, "num_cross_attention_heads": 20, "cross_attention_dim": 2240,
              "cross_attention_head_dim": 112},
    "tiny": {"num_layers": 2, "num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_dim": 64,
             "cross_attention_head_dim": 32, "caption_channels": 32},
}  # fmt: skip
BLOCKS = {"blocks": True}
COMPILED = {**BLOCKS, "decoder": True, "text": True}
# A way of drawing: recipe, [compile] and [quantize].
WAYS: dict[str, tuple[str | None, dict[str, Any], dict[str, Any]]] = {
    "eager": (None, {}, {}),
    "eager, balanced": ("balanced", {}, {}),
    "blocks compiled": (None, BLOCKS, {}),
    "blocks compiled, balanced": ("balanced", BLOCKS, {}),
    "blocks and encoder compiled": (None, {**BLOCKS, "text": True}, {}),
    "blocks and encoder compiled, balanced": ("balanced", {**BLOCKS, "text": True}, {}),
    "all compiled": (None, COMPILED, {}),
    "all compiled, balanced": ("balanced", COMPILED, {}),
    "all compiled, fast": ("fast", COMPILED, {}),
    "all compiled, 8 bits": (None, COMPILED, {"format": "auto"}),
    "all compiled, 8 bits, balanced": ("balanced", COMPILED, {"format": "auto"}),
    "blocks compiled, not replayed": (None, {"blocks": True, "cuda_graph": "never"}, {}),
    "blocks compiled, not fused": (None, {"blocks": True, "fuse": "never"}, {}),
}
# Those that the README shows.
SHOWN = ("eager", "eager, balanced", "all compiled", "all compiled, balanced", "all compiled, fast")


class CountingTokenizer:
    """As many tokens as a text has words and marks, which for these texts is about what Gemma's own gives."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self.padding_side = vocabulary, "right"

    def encode(self, text: str) -> list[int]:
        """Ids of <bos> and the words."""
        words = re.findall(r"\w+|[^\w\s]|\n", text)
        return [2, *(4 + zlib.crc32(word.encode()) % (self.vocabulary - 4) for word in words)]

    def __call__(self, texts: list[str], *, max_length: int, **options: Any) -> Any:
        rows = [self.encode(text)[:max_length] for text in texts]
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (max_length - len(row)) for row in rows])
        return SimpleNamespace(input_ids=ids, attention_mask=mask)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(run: Callable[[], Any], device: torch.device, *, repeats: int = 3, warm: int = 1) -> float:
    """The median of some runs after those that warm up."""
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def build_encoder(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> Any:
    """Gemma-2-2b."""
    from transformers import Gemma2Config, Gemma2Model

    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
                 num_key_value_heads=1, vocab_size=1000)  # fmt: skip
    full = dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, head_dim=256,
                num_key_value_heads=4, vocab_size=256000)  # fmt: skip
    with torch.device(device):
        return Gemma2Model(Gemma2Config(**(small if tiny else full))).to(dtype).eval()


def build_decoder(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> Any:
    """DC-AE f32c32."""
    from diffusers import AutoencoderDC

    widths = (8, 8, 16, 16, 32, 32) if tiny else (128, 256, 512, 512, 1024, 1024)
    scales = ((), (), (), (5,), (5,), (5,))
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    with torch.device(device):
        model = AutoencoderDC(
            attention_head_dim=8 if tiny else 32, encoder_block_types=kinds, decoder_block_types=kinds,
            encoder_block_out_channels=widths, decoder_block_out_channels=widths,
            encoder_layers_per_block=(1,) * 6 if tiny else (2, 2, 2, 3, 3, 3),
            decoder_layers_per_block=(1,) * 6 if tiny else (3,) * 6,
            encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales, upsample_block_type="interpolate",
            downsample_block_type="conv", scaling_factor=0.41407,
        )  # fmt: skip
    return model.to(dtype).eval()


def build(size: str, side: int, encoder: Any, decoder: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A SanaPipeline around the two."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    with torch.device(device):
        torch.manual_seed(0)
        transformer = SanaTransformer2DModel(
            **SIZES[size], attention_head_dim=32, sample_size=side // 32,
            interpolation_scale={2048: 1.0, 4096: 2.0}.get(side),
        )  # fmt: skip
    pipe = SanaPipeline(
        tokenizer=CountingTokenizer(encoder.config.vocab_size), text_encoder=encoder, vae=decoder,
        transformer=transformer.to(dtype).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0 if side == 4096 else 3.0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    if side > 2048:
        pipe.vae.enable_tiling(1024, 1024, 896, 896)
    return pipe


def draw(
    pipe: Any, side: int, *, steps: int = STEPS, out: str = "pt", on_step: Any = None, **words: Any
) -> Tensor:  # fmt: skip
    """One guided run's pictures, or its latents."""
    asked = words or {"prompt": PROMPT}
    images: Tensor = pipe(
        **asked, height=side, width=side, num_inference_steps=steps, guidance_scale=GUIDANCE, output_type=out,
        use_resolution_binning=False, generator=torch.Generator().manual_seed(0), callback_on_step_end=on_step,
    ).images  # fmt: skip
    return images


@torch.no_grad()
def encoded(pipe: Any, device: torch.device) -> dict[str, Any]:
    """Both prompts' embeddings, as the pipeline's call takes them."""
    import inspect

    instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    found = pipe.encode_prompt(PROMPT, True, device=device, complex_human_instruction=instruction)
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    return {**dict(zip(names, found, strict=True)), "prompt": None, "negative_prompt": None}


def measure(
    pipe: Any, side: int, name: str, device: torch.device, plain: Tensor | None, repeats: int, watch: bool
) -> tuple[dict[str, Any], Tensor]:
    """One way's row, and its latents. plain: diffusers' own latents, None while they are not drawn yet."""
    import hasten

    method, compiled, quantized = WAYS[name]
    words = encoded(pipe, device)
    began = time.perf_counter()
    stack = hasten.prepare(pipe, {"schema": 1, "compile": compiled, "quantize": quantized}) if compiled else None
    exact, drawn = "", []
    try:
        if method is None and stack is not None:
            # The first is launched, recorded and replayed, the second replayed alone, the third with gates.
            same = [draw(pipe, side, steps=3, out="latent", **words) for _ in range(2)]
            with hasten.accelerate(pipe, {"schema": 1, "cache": {"method": "interval", "every": 1}}):
                same.append(draw(pipe, side, steps=3, out="latent", **words))
            exact = str(all(torch.equal(one, same[0]) for one in same))
        # "eager" is diffusers alone.
        ours = hasten.accelerate(pipe, method or {"schema": 1}) if method or compiled else nullcontext()
        with ours as run:
            draw(pipe, side, steps=STEPS if side <= 2048 else 2)  # a large one is warm enough then, and takes long
            wait(device)
            first_s = time.perf_counter() - began
            encoder_ms = milliseconds(lambda: encoded(pipe, device), device, repeats=repeats)
            if side > 2048:
                whole_ms, decoder_ms, latents = timed_once(pipe, side, device)
                run_ms = whole_ms - decoder_ms - encoder_ms
            else:
                whole_ms = milliseconds(lambda: draw(pipe, side), device, repeats=repeats, warm=0)
                run_ms = milliseconds(
                    lambda: drawn.append(draw(pipe, side, out="latent", **words)), device, repeats=repeats, warm=0
                )
                latents = drawn[-1]
                decoder_ms = milliseconds(lambda: decoded(pipe, latents), device, repeats=repeats)
            if watch and compiled and device.type == "cuda":
                profile(pipe, side, device)
    finally:
        if stack is not None:
            stack.undo()
    off = 0.0 if plain is None else float((latents.float() - plain.float()).norm() / plain.float().norm())
    report = None if run is None else run.report
    return {
        "way": name, "computed": STEPS if report is None else report.computed, "whole_ms": whole_ms,
        "denoise_ms": run_ms, "step_ms": run_ms / STEPS, "decoder_ms": decoder_ms, "encoder_ms": encoder_ms,
        "latents_off": off, "gates_exact": exact, "first_s": first_s,
        "notes": "" if report is None else "; ".join(report.notes),
    }, latents  # fmt: skip


def timed_once(pipe: Any, side: int, device: torch.device) -> tuple[float, float, Tensor]:
    """One call's milliseconds, those of them behind the last step, and its latents: large pictures take long."""
    latents, steps_done = torch.empty(0), 0.0

    def stepped(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal latents, steps_done
        if step == STEPS - 1:
            wait(device)
            latents, steps_done = tensors["latents"], time.perf_counter()
        return {}

    wait(device)
    began = time.perf_counter()
    draw(pipe, side, on_step=stepped)
    wait(device)
    ended = time.perf_counter()
    return 1000 * (ended - began), 1000 * (ended - steps_done), latents


@torch.no_grad()
def decoded(pipe: Any, latents: Tensor) -> Any:
    """The decoder's part of a call."""
    return pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample


def profile(pipe: Any, side: int, device: torch.device) -> None:
    """Prints the longest kernels of a few steps and a decoding."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    with watch(activities=[ProfilerActivity.CUDA]) as seen:
        draw(pipe, side, steps=4)
        wait(device)
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)
    print(f"kernels of 4 steps and a decoding, {sum(r.self_device_time_total for r in rows) / 1000:.1f} ms in all:")
    for row in rows[:16]:
        print(f"{row.self_device_time_total / 1000:8.2f} ms {row.count:>5} {row.key[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["600M", "1600M"], choices=list(SIZES))
    parser.add_argument("--sides", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument(
        "--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY", help=", ".join(WAYS)
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--profile", action="store_true", help="also print where a GPU's time goes, for each compiled way"
    )
    parser.add_argument("--tiny", action="store_true", help="small models at 128x128; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--add", action="store_true", help="keep the file's other rows")
    parser.add_argument("--table", type=Path, help="only rewrite the README's table, from this CSV")
    args = parser.parse_args()
    if args.table:
        write_readme(kept(args.table))
        return
    device, dtype = torch.device(args.device), torch.bfloat16
    sizes, sides = (["tiny"], [128]) if args.tiny else (args.sizes, args.sides)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    rows: list[dict[str, Any]] = []
    before = kept(args.out) if args.add and args.out.exists() else []
    encoder, decoder = build_encoder(device, dtype, tiny=args.tiny), build_decoder(device, dtype, tiny=args.tiny)
    for side in sides:
        for size in sizes:
            pipe = build(size, side, encoder, decoder, device, dtype)
            plain = eager = None
            for way in args.ways:
                try:
                    row, latents = measure(pipe, side, way, device, plain, 1 if side > 2048 else 3, args.profile)
                except Exception as error:  # the other ways are measured all the same
                    print(f"{size} {side} {way}: {type(error).__name__}: {str(error).strip()[:300]}", flush=True)
                    continue
                if way == "eager":
                    plain, eager = latents, row["whole_ms"]
                rows.append(
                    {"size": size, "side": side, **row, "of_eager": row["whole_ms"] / (eager or row["whole_ms"])}
                )
                rows[-1] |= {"device": name, "torch": torch.__version__}
                told = ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
                print(told, flush=True)
                if not args.tiny:
                    new = {(r["size"], str(r["side"]), r["way"]) for r in rows}
                    write([*(r for r in before if (r["size"], r["side"], r["way"]) not in new), *rows], args.out)
            del pipe
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if args.out == RESULTS and not args.tiny:
        write_readme(kept(RESULTS))
    print(f"{name}, bfloat16, {STEPS} steps with CFG {GUIDANCE}, random weights; milliseconds")
    print(f"size    side {'way':38} computed     step    whole  decoder  encoder of eager      off")
    for r in rows:
        print(
            f"{r['size']:6} {r['side']:>5} {r['way']:38} {r['computed']:>8} {r['step_ms']:>8.2f} {r['whole_ms']:>8.1f} "
            f"{r['decoder_ms']:>8.1f} {r['encoder_ms']:>8.1f} {r['of_eager']:>8.3f} {r['latents_off']:>8.4f}"
        )


def kept(path: Path) -> list[dict[str, Any]]:
    """The file's rows."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_readme(rows: list[dict[str, Any]]) -> None:
    """The README's table: each part in milliseconds, and its share of the three."""
    head = ["model, size", "way", "steps computed", "text to pixels", "of eager", "encoder", "steps", "decoder"]
    body = []
    for r in (row for row in rows if row["way"] in SHOWN):
        parts = [float(r[f"{name}_ms"]) for name in ("encoder", "denoise", "decoder")]
        body.append([
            f"{r['size']}, {r['side']}x{r['side']}", r["way"], str(r["computed"]), f"{float(r['whole_ms']):.0f} ms",
            f"{float(r['of_eager']):.2f}", *(f"{part:.0f} ms, {100 * part / sum(parts):.0f} %" for part in parts),
        ])  # fmt: skip
    tables.rewrite("sana", head, body)


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Rewrites the file."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in rows)


if __name__ == "__main__":
    main()
