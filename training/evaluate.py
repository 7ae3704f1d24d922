"""Measures a flux-nano folder: held-out prompts through a plain FluxPipeline, judged by the checker.

    python evaluate.py --model ../models/flux-nano --out eval                      # 200 prompts, 128x128, 28 steps
    python evaluate.py --model ../models/flux-nano --out eval --size 256x256 --count 50 --length 512

Prints the shares that show the right object, colour and place, and all three; by kind of thing too. Writes the
pictures as one contact sheet (a wrong one has a red edge) and the verdicts as JSON. `--time` times one 256x256 picture.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from checker import Checker, Verdict
from diffusers import FluxPipeline
from PIL import Image, ImageOps
from scenes import Scene, held_out_prompts

BATCH = 20
PARTS = ("object_ok", "colour_ok", "place_ok", "ok")


def paint(
    pipe: FluxPipeline, scenes: list[Scene], *, width: int, height: int, steps: int, guidance: float, length: int
) -> list[Image.Image]:
    """One picture per scene; picture i has seed i, whatever the batches are."""
    pictures: list[Image.Image] = []
    for start in range(0, len(scenes), BATCH):
        batch = scenes[start : start + BATCH]
        seeds = [torch.Generator().manual_seed(start + offset) for offset in range(len(batch))]
        captions = [scene.caption for scene in batch]
        made = pipe(
            captions, width=width, height=height, num_inference_steps=steps, guidance_scale=guidance,
            max_sequence_length=length, generator=seeds,
        )  # fmt: skip
        pictures += made.images
        print(f"\r{len(pictures)}/{len(scenes)}", end="", flush=True)
    print()
    return pictures


def sheet(pictures: list[Image.Image], verdicts: list[Verdict], columns: int) -> Image.Image:
    """All pictures in rows; wrong ones in red."""
    framed = [ImageOps.expand(p, 3, "black" if v.ok else "red") for p, v in zip(pictures, verdicts, strict=True)]
    width, height = framed[0].size
    page = Image.new("RGB", (columns * width, -(-len(framed) // columns) * height))
    for index, picture in enumerate(framed):
        page.paste(picture, (index % columns * width, index // columns * height))
    return page


def shares(verdicts: list[Verdict]) -> dict[str, float]:
    """Share of the verdicts that are right, for each part."""
    return {part: sum(getattr(verdict, part) for verdict in verdicts) / len(verdicts) for part in PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--size", default="128x128", help="WIDTHxHEIGHT")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--length", type=int, default=64, help="text tokens; the pipeline's own default is 512")
    parser.add_argument("--time", action="store_true", help="time one 256x256 picture at the pipeline's defaults")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    width, height = (int(side) for side in args.size.split("x"))
    pipe = FluxPipeline.from_pretrained(args.model).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if args.time:
        began = time.perf_counter()
        pipe("a red apple on a blue table", width=256, height=256, num_inference_steps=28)
        print(f"256x256, 28 steps, text padded to 512: {time.perf_counter() - began:.1f} s on {args.device}")
        return
    wanted = held_out_prompts(args.count)
    pictures = paint(
        pipe, wanted, width=width, height=height, steps=args.steps, guidance=args.guidance, length=args.length
    )
    checker = Checker()
    verdicts = [checker.check(picture, scene) for picture, scene in zip(pictures, wanted, strict=True)]
    kinds = defaultdict(list)
    for scene, verdict in zip(wanted, verdicts, strict=True):
        kinds["two things" if scene.second else scene.first.kind].append(verdict)
    figures = {"all": shares(verdicts)} | {kind: shares(group) for kind, group in sorted(kinds.items())}
    for kind, share in figures.items():
        count = len(verdicts) if kind == "all" else len(kinds[kind])
        print(
            f"{kind:10} ({count:3}): "
            + "  ".join(f"{part.removesuffix('_ok')} {100 * value:.1f} %" for part, value in share.items())
        )
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{args.size}-{args.steps}-{args.guidance:g}"
    sheet(pictures, verdicts, 20 if width <= 128 else 10).save(args.out / f"sheet-{name}.png")
    rows = [
        {"caption": scene.caption, **{part: getattr(verdict, part) for part in PARTS}}
        for scene, verdict in zip(wanted, verdicts, strict=True)
    ]
    (args.out / f"verdicts-{name}.json").write_text(json.dumps({"figures": figures, "verdicts": rows}, indent=1))


if __name__ == "__main__":
    main()
