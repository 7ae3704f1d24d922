"""Where Sana's time goes: eager, compiled and cached steps, the decoder and the encoder, for random weights on a GPU.

    python benchmarks/sana.py                                # 600M and 1600M at 1024x1024 and 4096x4096
    python benchmarks/sana.py --sizes 1600M --sides 1024     # less than two minutes
    python benchmarks/sana.py --tiny --device cpu            # seconds: proves that it runs, its figures mean nothing

Random weights take the time of trained ones and say nothing of pictures. A step is one call of the transformer on the
guided batch of two; what is compared is 20 steps with CFG, decoded, in bfloat16. Each stack without a cache is held
against itself with gates that never reuse (it must be the same to the bit) before anything is timed. Rewrites
benchmarks/results/sana.csv; prints a short table last.
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
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

RESULTS = ROOT / "benchmarks" / "results" / "sana.csv"
STEPS, TOKENS, GUIDANCE = 20, 300, 4.5
SIZES: dict[str, dict[str, int]] = {
    "600M": {"num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_dim": 1152,
             "cross_attention_head_dim": 72},
    "1600M": {"num_layers": 20, "num_attention_heads": 70, "num_cross_attention_heads": 20, "cross_attention_dim": 2240,
              "cross_attention_head_dim": 112},
    "tiny": {"num_layers": 4, "num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_dim": 64,
             "cross_attention_head_dim": 32},
}  # fmt: skip
RECIPES = ("balanced", "fast")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(run: Callable[[], Any], device: torch.device, *, repeats: int = 5) -> float:
    """The median of some runs after two that warm up."""
    run(), run()
    times = []
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def build(size: str, side: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A SanaPipeline without encoder and decoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    with torch.device(device):
        torch.manual_seed(0)
        transformer = SanaTransformer2DModel(
            **SIZES[size], attention_head_dim=32, sample_size=side // 32,
            interpolation_scale={2048: 1.0, 4096: 2.0}.get(side),
        )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0 if side == 4096 else 3.0)
    pipe = SanaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer.to(device, dtype).eval(),
        scheduler=scheduler,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def words(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Embeddings of a prompt of 40 tokens and of an empty one."""
    given: dict[str, Any] = {"prompt": None, "negative_prompt": None}
    for prefix, count in (("", 40), ("negative_", 1)):
        given[f"{prefix}prompt_embeds"] = torch.randn(1, TOKENS, 2304, device=device, dtype=dtype)
        given[f"{prefix}prompt_attention_mask"] = (torch.arange(TOKENS, device=device) < count).long()[None]
    return given


@torch.no_grad()
def draw(pipe: Any, given: dict[str, Any], side: int, steps: int = STEPS) -> Tensor:
    """The latents of one guided run."""
    out: Tensor = pipe(
        **given, height=side, width=side, num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="latent",
        use_resolution_binning=False, generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return out


def measure(size: str, side: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> list[dict[str, Any]]:
    """A row for each way of drawing: milliseconds of one run's transformer, and of one computed step."""
    import hasten

    rows: list[dict[str, Any]] = []
    pipe, given = build(size, side, device, dtype), words(device, dtype)
    for stack in ("eager", "compiled") if compiled else ("eager",):
        if stack == "compiled":
            pipe.transformer.compile_repeated_blocks(dynamic=False)
            draw(pipe, given, side, 2)
        plain = draw(pipe, given, side, 3)
        with hasten.accelerate(pipe, {"schema": 1, "cache": {"method": "interval", "every": 1}}):
            assert torch.equal(draw(pipe, given, side, 3), plain), (
                f"{stack}: gates that never reuse changed the latents"
            )
        repeats = 3 if side > 1024 else 5
        run_ms = milliseconds(lambda: draw(pipe, given, side), device, repeats=repeats)
        rows.append({"way": stack, "run_ms": run_ms, "step_ms": run_ms / STEPS, "computed": STEPS})
        for recipe in RECIPES:
            with hasten.accelerate(pipe, recipe) as run:
                run_ms = milliseconds(lambda: draw(pipe, given, side), device, repeats=repeats)
            computed = run.report.computed
            rows.append({"way": f"{stack} {recipe}", "run_ms": run_ms, "step_ms": run_ms / STEPS, "computed": computed})
    return [{"size": size, "side": side, **row} for row in rows]


@torch.no_grad()
def decoder_ms(side: int, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> float:
    """DC-AE f32c32 with random weights, in tiles above 2048."""
    from diffusers import AutoencoderDC

    widths = (8, 8, 16, 16, 32, 32) if tiny else (128, 256, 512, 512, 1024, 1024)
    scales = ((), (), (), (5,), (5,), (5,))
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    model = AutoencoderDC(
        attention_head_dim=8 if tiny else 32, encoder_block_types=kinds, decoder_block_types=kinds,
        encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 6 if tiny else (2, 2, 2, 3, 3, 3),
        decoder_layers_per_block=(1,) * 6 if tiny else (3,) * 6,
        encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales, upsample_block_type="interpolate",
        downsample_block_type="conv",
    )  # fmt: skip
    model = model.to(device, dtype).eval()
    if side > 2048:
        model.enable_tiling(1024, 1024, 896, 896)
    latent = torch.randn(1, 32, side // 32, side // 32, device=device, dtype=dtype)
    return milliseconds(lambda: model.decode(latent), device, repeats=3)


@torch.no_grad()
def encoder_ms(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> float | None:
    """Gemma-2-2b with random weights on a prompt behind the instruction and an empty one; None without transformers."""
    try:
        from transformers import Gemma2Config, Gemma2Model
    except ImportError:
        return None
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
                 num_key_value_heads=1, vocab_size=1000)  # fmt: skip
    full = dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, head_dim=256,
                num_key_value_heads=4, vocab_size=256000)  # fmt: skip
    with torch.device(device):
        model = Gemma2Model(Gemma2Config(**(small if tiny else full))).to(dtype).eval()
    instruction = 250  # tokens, about
    long, short = (torch.ones(1, n, dtype=torch.long, device=device) for n in (TOKENS + instruction, TOKENS))

    def both() -> None:
        model(long, attention_mask=long)
        model(short, attention_mask=short)

    return milliseconds(both, device, repeats=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["600M", "1600M"], choices=list(SIZES))
    parser.add_argument("--sides", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small models at 128x128; nothing is written")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), torch.bfloat16
    sizes, sides = (["tiny"], [128]) if args.tiny else (args.sizes, args.sides)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    rows: list[dict[str, Any]] = []
    encoder = encoder_ms(device, dtype, tiny=args.tiny)
    for side in sides:
        decoder = decoder_ms(side, device, dtype, tiny=args.tiny)
        for size in sizes:
            found = measure(size, side, device, dtype, compiled=not args.no_compile and device.type == "cuda")
            for row in found:
                whole = row["run_ms"] + decoder + (encoder or 0.0)
                row |= {"decoder_ms": decoder, "encoder_ms": encoder, "whole_ms": whole, "device": name}
                row |= {"of_eager": whole / found[0].get("whole_ms", whole), "torch": torch.__version__}
            rows += found
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if not args.tiny:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: round(v, 3) if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    print(f"{name}, bfloat16, {STEPS} steps with CFG {GUIDANCE}, random weights; milliseconds")
    print("size    side way                  computed     step       run  decoder  encoder of eager")
    for r in rows:
        told = "-" if r["encoder_ms"] is None else f"{r['encoder_ms']:.1f}"
        print(
            f"{r['size']:6} {r['side']:>5} {r['way']:20} {r['computed']:>8} {r['step_ms']:>8.2f} {r['run_ms']:>9.1f} "
            f"{r['decoder_ms']:>8.1f} {told:>8} {r['of_eager']:>8.2f}"
        )


if __name__ == "__main__":
    main()
