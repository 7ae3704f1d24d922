"""Trains sana-nano from nothing to a SanaPipeline folder, on the scenes of scenes.py.

    python sana_train.py --out work/sana --data work/data --minutes 12      # one GPU
    python sana_train.py --out work/try --data work/try --minutes 0.3 --count 64 --batch 4 --device cpu

A share of the minutes each: the DC-AE on crops and whole pictures, Gemma-2 on naming what a caption says, then the
transformer by flow matching on latents that are encoded once. The schedules run on the clock. Ends by drawing held-out
prompts with a plain SanaPipeline from the written folder and by the checker's verdicts on them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from autoencoder import to_signed
from checker import WEIGHTS, Checker
from dataset import DrawnSet, draw_set
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from muon import Muon
from sana_models import (
    SCALE,
    SHIFT,
    SIDE,
    TOKENS,
    build_autoencoder,
    build_text,
    build_tokenizer,
    build_transformer,
    encode,
    fold_scale,
    velocity,
)
from scenes import held_out_prompts, is_taught, scenes
from torch import Tensor, nn
from train_autoencoder import edge_loss
from train_text import CORPUS_START, AttributeHeads, attributes_of, corpus, varied

SHARES = {"autoencoder": 0.4, "text": 0.1, "flow": 0.5}
CENTRE_WEIGHT = 0.02
DROP = 0.1  # captions left out, for guidance
RATES = {"autoencoder": 3e-3, "text": 1.5e-3, "flow": 1.5e-3}


class Clock:
    """Steps of one part: yields how much of its minutes is gone, 0 to 1."""

    def __init__(self, minutes: float) -> None:
        self.minutes, self.began = minutes, time.monotonic()

    def steps(self) -> Iterator[tuple[int, float]]:
        for step in itertools.count():
            share = (time.monotonic() - self.began) / (60 * self.minutes)
            if share >= 1 and step > 0:
                return
            yield step, min(share, 1.0)


class Optimiser:
    """Muon for matrices and kernels, AdamW for the rest, one falling rate, and a moving average of the model."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.model, self.rate = model, rate
        self.average = copy.deepcopy(model).requires_grad_(False)
        wide = [p for name, p in model.named_parameters() if p.ndim >= 2 and "table" not in name]
        rest = [p for name, p in model.named_parameters() if p.ndim < 2 or "table" in name]
        self.parts = [Muon(wide, lr=rate), torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]
        self.steps = 0

    def step(self, loss: Tensor, share: float) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = self.rate * min(1, (self.steps + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * share)) + 1e-6
        for part in self.parts:
            part.param_groups[0]["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)
        self.steps += 1
        decay = min(0.998, (self.steps + 1) / (self.steps + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)


def pictures_of(drawn: DrawnSet, rows: np.ndarray, device: str) -> Tensor:
    """(B, 3, H, W), -1 to 1."""
    return to_signed(torch.from_numpy(np.asarray(drawn.pixels[rows]))).to(device)


def train_autoencoder(drawn: DrawnSet, args: argparse.Namespace) -> nn.Module:
    """The averaged DC-AE, its latents' scale folded in."""
    rng = np.random.default_rng(0)
    model = build_autoencoder().to(args.device, memory_format=torch.channels_last)
    optimiser = Optimiser(model, RATES["autoencoder"])
    for step, share in Clock(args.minutes * SHARES["autoencoder"]).steps():
        true = pictures_of(drawn, np.sort(rng.choice(len(drawn.seeds), max(2, args.batch // 8))), args.device)
        true = true.contiguous(memory_format=torch.channels_last)
        with torch.autocast(args.device, torch.bfloat16):
            latent = model.encode(true).latent
            made = model.decode(latent).sample.float()
        latent = latent.float()
        # No shift can be folded in later (the decoder pads with zeros): each channel is held about zero from here.
        off = latent.mean((0, 2, 3)).square().mean() + (latent.std((0, 2, 3)) - 1).square().mean()
        loss = (made - true).abs().mean() + edge_loss(made, true) + CENTRE_WEIGHT * off
        optimiser.step(loss, share)
        if step % 100 == 0:
            print(f"autoencoder {step} {share:.2f} loss {loss.item():.4f}", flush=True)
    best = optimiser.average.eval().to(memory_format=torch.contiguous_format)  # as safetensors will have it
    fold_scale(best, pictures_of(drawn, np.arange(min(256, len(drawn.seeds))), args.device))
    with torch.no_grad():
        true = pictures_of(drawn, np.arange(min(48, len(drawn.seeds))), args.device)
        error = ((best.decode(best.encode(true).latent).sample.clamp(-1, 1) - true) / 2).square().mean((1, 2, 3))
    print(f"autoencoder: {optimiser.steps} steps, {-10 * error.log10().mean().item():.2f} dB")
    return best


def train_text(args: argparse.Namespace) -> tuple[nn.Module, object]:
    """Gemma-2, frozen from here on, and its tokenizer."""
    tokenizer = build_tokenizer(corpus(20_000 if args.count > 1000 else 300))
    both = nn.ModuleDict({"gemma": build_text(tokenizer), "heads": AttributeHeads()}).to(args.device)
    optimiser = torch.optim.AdamW(both.parameters(), lr=RATES["text"], weight_decay=1e-2, betas=(0.9, 0.98))
    source, rng = scenes(CORPUS_START, taught=False), random.Random(1)
    for step, share in Clock(args.minutes * SHARES["text"]).steps():
        batch = list(itertools.islice(source, args.batch))
        targets = torch.tensor([attributes_of(scene) for scene in batch], device=args.device)
        states, mask = encode(both["gemma"], tokenizer, [varied(scene.caption, rng) for scene in batch])
        last = states[torch.arange(len(batch)), mask.sum(1) - 1]
        loss, by_tokens, by_last = both["heads"](states * mask[..., None], last, targets)
        optimiser.param_groups[0]["lr"] = RATES["text"] * (0.5 + 0.5 * math.cos(math.pi * share)) + 1e-6
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 200 == 0:
            print(f"text {step} {share:.2f} loss {loss.item():.3f} right {by_tokens:.3f} {by_last:.3f}", flush=True)
    return both["gemma"].eval().requires_grad_(False), tokenizer


def train_flow(
    drawn: DrawnSet,
    autoencoder: nn.Module,
    gemma: nn.Module,
    tokenizer: object,
    args: argparse.Namespace,
    *,
    start: nn.Module | None = None,
) -> nn.Module:
    """The averaged transformer; `start` is one to train on, with all of the minutes."""
    with torch.no_grad():
        parts = np.array_split(np.arange(len(drawn.seeds)), -(-len(drawn.seeds) // 64))
        latents = torch.cat([autoencoder.encode(pictures_of(drawn, rows, args.device)).latent for rows in parts])
        latents = latents.float() * SCALE
    told = [drawn.scene(row) for row in range(len(drawn.seeds))]
    usable = [row for row, scene in enumerate(told) if is_taught(scene)]
    print(f"flow: {len(usable)} pictures, latents' deviation {latents.std().item():.3f}", flush=True)
    rng = random.Random(0)
    model = build_transformer() if start is None else start.float()
    optimiser = Optimiser(model.to(args.device), RATES["flow"])
    minutes = args.minutes * (SHARES["flow"] if start is None else 1)
    for step, share in Clock(minutes).steps():
        rows = [rng.choice(usable) for _ in range(args.batch)]
        captions = ["" if rng.random() < DROP else varied(told[row].caption, rng) for row in rows]
        with torch.no_grad():
            text = encode(gemma, tokenizer, captions)
        x0 = latents[rows]
        noise, u = torch.randn_like(x0), torch.rand(len(rows), device=args.device)
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)  # as densely as the steps of a run lie
        noisy = torch.lerp(x0, noise, sigma[:, None, None, None])
        with torch.autocast(args.device, torch.bfloat16):
            made = velocity(model, noisy, sigma, text).float()
        loss = F.mse_loss(made, noise - x0)
        optimiser.step(loss, share)
        if step % 200 == 0:
            print(f"flow {step} {share:.2f} loss {loss.item():.4f}", flush=True)
    print(f"flow: {optimiser.steps} steps")
    return optimiser.average.eval()


def judge(folder: Path, args: argparse.Namespace) -> None:
    """Draws held-out prompts with a plain SanaPipeline and prints the checker's verdicts."""
    pipe = SanaPipeline.from_pretrained(folder).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    wanted, pictures = held_out_prompts(args.judged), []
    for start in range(0, len(wanted), 20):
        batch = wanted[start : start + 20]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        pictures += pipe(
            [scene.caption for scene in batch], width=SIDE, height=SIDE, num_inference_steps=20, guidance_scale=4.5,
            generator=seeds, max_sequence_length=TOKENS, complex_human_instruction=None, use_resolution_binning=False,
        ).images  # fmt: skip
    (args.out / "pictures").mkdir(exist_ok=True)
    for i, picture in enumerate(pictures[:40]):
        picture.save(args.out / "pictures" / f"{i:03}.png")
    if WEIGHTS.exists():
        checker = Checker()
        verdicts = [checker.check(picture, scene) for picture, scene in zip(pictures, wanted, strict=True)]
        for part in ("object_ok", "colour_ok", "place_ok", "ok"):
            print(f"{part}: {100 * sum(getattr(v, part) for v in verdicts) / len(verdicts):.1f} % of {len(verdicts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--count", type=int, default=30_000, help="pictures to draw")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--workers", type=int, default=16, help="processes that draw")
    parser.add_argument("--on", type=Path, help="a written folder whose transformer is trained on")
    parser.add_argument("--judged", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    drawn = draw_set(args.data, SIDE, SIDE, start=0, count=args.count, workers=args.workers, taught=True)
    if args.on:
        before = SanaPipeline.from_pretrained(args.on)
        autoencoder = before.vae.float().to(args.device)
        gemma, tokenizer = before.text_encoder.float().to(args.device).requires_grad_(False), before.tokenizer
        transformer = train_flow(drawn, autoencoder, gemma, tokenizer, args, start=before.transformer)
    else:
        autoencoder = train_autoencoder(drawn, args)
        gemma, tokenizer = train_text(args)
        transformer = train_flow(drawn, autoencoder, gemma, tokenizer, args)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipe = SanaPipeline(
        tokenizer=tokenizer, text_encoder=gemma, vae=autoencoder.to(torch.bfloat16),
        transformer=transformer.to(torch.bfloat16), scheduler=scheduler,
    )  # fmt: skip
    pipe.save_pretrained(args.out / "sana-nano", max_shard_size="12MB")
    size = sum(file.stat().st_size for file in (args.out / "sana-nano").rglob("*") if file.is_file())
    print(f"written: {size / 2**20:.1f} MiB")
    judge(args.out / "sana-nano", args)


if __name__ == "__main__":
    main()
